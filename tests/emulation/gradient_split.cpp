// gradient_split.cpp: gradient.cpp of f32 to its own precision, rows and weights in two parts.
#define PARTS 2
#include "gradient.cpp"
