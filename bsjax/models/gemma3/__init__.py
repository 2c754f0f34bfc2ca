"""Gemma 3: local and global layers, bidirectional attention within images, a SigLIP tower."""
