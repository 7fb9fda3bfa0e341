"""Structure prediction by substitution of elements: Ryan, Lengyel and Shatruk 2018."""
