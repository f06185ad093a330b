"""Training through Lightning and Hydra; the only part of the package that imports them."""
