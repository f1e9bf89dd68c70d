"""What the page adds to gradio's components for people who hear it, or need contrast."""

import gradio as gr


SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # no request to a font server

THEME = gr.themes.Soft(primary_hue="blue", font=SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")).set(
    # The theme's own colours have too little contrast on white.
    color_accent="*primary_700",
    block_label_text_color="*primary_800",
    block_title_text_color="*primary_800",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    link_text_color="*primary_800",
    link_text_color_dark="*primary_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    # Nor do its fields, upload areas and buttons have an edge there.
    block_border_width="1px",
    block_border_color="*neutral_200",
    input_border_width="1px",
    input_border_color="*neutral_400",
    button_secondary_background_fill="*neutral_100",
    button_secondary_background_fill_hover="*neutral_200",
)

SPEAK = """() => {
    const name = () => {
        // screen readers say what changes there
        document.querySelectorAll(':is(#verdict, #answer, #outcome):not([aria-live])').forEach(
            (place) => place.setAttribute('aria-live', 'polite'));
        document.querySelectorAll('.gallery-item:not([aria-label])').forEach(
            (button) => button.setAttribute('aria-label',
                'Example ' + (1 + [...button.parentNode.children].indexOf(button))));
        document.querySelectorAll('#picture img:not([alt])').forEach((image) => image.alt = 'Your picture');
        // a name that a plain div may not have, and one that hides what stands on the button
        document.querySelectorAll('div.empty[aria-label]').forEach((empty) => empty.removeAttribute('aria-label'));
        document.querySelectorAll('button[aria-label][aria-dropeffect]').forEach(
            (button) => button.textContent.trim() && button.removeAttribute('aria-label'));
        document.querySelectorAll('button:has(button):not([role=group])').forEach((outer) => {
            outer.setAttribute('role', 'group');
            outer.tabIndex = -1;
            outer.querySelector('button').setAttribute('aria-label', 'Add files');
        });
    };
    name();
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
}"""
"""JavaScript for `Blocks.load`."""
