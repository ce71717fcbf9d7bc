"""The method on a world in which every answer is known: python examples/gaussian_world.py

Two classes of 8 x 8 images, N(mean_k, 0.3^2). The evidence measured by adding and removing noise is
held against the exact log-likelihood ratio.
"""

import torch

from cytodiffusion import GaussianWorld, log_evidence, stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.data.transforms import POSES

generator = torch.Generator().manual_seed(0)
means = torch.stack([torch.full((3, 8, 8), -0.1), torch.full((3, 8, 8), 0.1)])
world = GaussianWorld(means, std=0.3)
images = world.sample(torch.tensor([0, 1, 0, 1]), generator)

draws = stratified(levels=60, low=0.01, high=30.0, antithetic=True, poses=False)
names = [str(i) for i in range(len(images))]
measurement = Measurement(draws, columns=3, poses=POSES)
errors = measurement.measure(DenoiserMeter(world), images, names)
evidence = log_evidence(errors[:, :, :2], draws.sigmas, pixels=images[0].numel())
exact = world.log_density(images)

print("ln p(x|1) - ln p(x|0)    measured     exact")
for i in range(len(images)):
    measured = evidence[i, 1] - evidence[i, 0]
    print(f"image {i}              {measured:11.2f} {exact[i, 1] - exact[i, 0]:9.2f}")
