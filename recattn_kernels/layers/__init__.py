"""torch.nn.Module layers on top of the ops."""
