"""The second world of the lab: tinted garments from Fashion-MNIST."""
