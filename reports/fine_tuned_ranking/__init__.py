"""How well estimators order sharing configs by their loss after fine-tuning."""
