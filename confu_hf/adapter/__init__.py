"""The PEFT method: what ConFu keeps on a target."""
