"""Which model a browser's tab uses: a visitor's own is found again after a reload, and in a new tab.

Each tab remembers its own key, so that what one forgets stays in the others. A new tab gets that of the last lesson.
"""

PLACE = "hf-clpeft-model"

RECALL = f"""() => {{
    try {{
        const own = sessionStorage.getItem('{PLACE}');
        return own === null ? localStorage.getItem('{PLACE}') ?? '' : own;
    }} catch {{ return ''; }}  // a browser that stores nothing
}}"""
"""JavaScript: the key of the tab's model; empty for the served one."""

KEEP = f"""(key) => {{
    try {{
        const old = sessionStorage.getItem('{PLACE}') ?? localStorage.getItem('{PLACE}');
        sessionStorage.setItem('{PLACE}', key ?? '');
        if (key) localStorage.setItem('{PLACE}', key);
        else if (localStorage.getItem('{PLACE}') === old) localStorage.removeItem('{PLACE}');
    }} catch {{}}
}}"""
"""JavaScript: remembers the key of the tab's model, or forgets it."""
