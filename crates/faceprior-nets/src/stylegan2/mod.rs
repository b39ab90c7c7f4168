//! StyleGAN2-ADA.
