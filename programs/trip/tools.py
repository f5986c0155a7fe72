"""How warm cities are: means of a whole year, in degrees Celsius. A table, so that the example needs no network."""

from nimbos.adk import tool

MEANS = {
    "Athens": 18.7,
    "Berlin": 10.1,
    "Cairo": 22.1,
    "Dublin": 9.8,
    "Helsinki": 6.5,
    "Lisbon": 17.5,
    "London": 11.8,
    "Madrid": 15.0,
    "Mumbai": 27.3,
    "New York": 13.2,
    "Oslo": 6.5,
    "Paris": 12.8,
    "Reykjavik": 5.1,
    "Rome": 16.1,
    "Sydney": 18.1,
    "Tokyo": 15.8,
    "Vienna": 11.4,
}


@tool(effect="pure")
def temperature(city: str) -> str:
    """How warm a city is on average, over the whole year.

    Args:
        city: The city's English name.
    """
    if city not in MEANS:
        raise LookupError(f"{city} is not in the table, which has {', '.join(MEANS)}.")
    return f"{city} has {MEANS[city]} degrees Celsius."
