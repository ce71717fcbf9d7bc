"""From what lies on disk to images with labels: readers, checks, splits, transforms, taxonomy."""
