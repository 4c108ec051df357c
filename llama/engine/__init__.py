"""The generation loop: sequences, passes of the network, sampling, and the text of completions."""
