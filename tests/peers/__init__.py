"""Live comparisons with timm and transformers, in an environment of their own (`make peers`)."""
