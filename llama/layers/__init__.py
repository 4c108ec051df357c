"""The sharded layers and the products that they compute."""
