"""Making trained diffusion transformers shallow (TinyFusion, arXiv 2412.01199) as a PyTorch Lightning plugin."""
