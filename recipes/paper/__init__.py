"""What the experiments of the AdaScale paper are made of; recipes/reproduce.py runs them."""
