"""What a model, a picture's way into it, and a run are: frozen dataclasses, free of torch.

Every knob is described once, by the docstring under its field, which is also its command line help.
"""
