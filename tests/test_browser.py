"""The demo as people meet it: in Chromium, on wide and narrow screens, light and dark, with the network closed."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from hf_clpeft.backbones.bundled import DIGITS_MODEL, bundled_folder
from hf_clpeft.demo.charts import heat_table
from hf_clpeft.demo.models import Models
from hf_clpeft.demo.names import Name
from hf_clpeft.demo.pictures import VisitorError


CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver")

EXAMPLES = bundled_folder(DIGITS_MODEL) / "examples"
AXE = "axe-core@4"
TABS = ("Try it", "Many pictures", "Look inside", "Teach it")
FLAGS = """
    --headless=new --no-sandbox --disable-gpu --enable-unsafe-swiftshader --no-first-run --disable-quic
    --disable-background-networking --disable-component-update --disable-sync
""".split()


UNDER_BUTTONS = """
    const box = (element) => element.getBoundingClientRect();
    return [...document.querySelectorAll('label[data-testid=block-label]')].filter((label) => {
        const buttons = label.parentElement.querySelector('.icon-button-wrapper');
        return label.offsetParent && buttons && box(label).right > box(buttons).left;
    }).map((label) => label.innerText)
"""


CUT_OFF = """
    const shown = document.querySelector('.heat');
    shown.insertAdjacentHTML('afterend', arguments[0]);
    return shown.nextElementSibling.scrollWidth - shown.nextElementSibling.clientWidth
"""


class Visitor:
    """A browser with the words for what people do on the page."""

    def __init__(self):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def open(self, page, width=1280, theme="light"):
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.width = width
        self.driver.get(f"{page}?__theme={theme}")
        self.wait("#picture img")  # the first example, which would come after what a hasty visitor gives

    def wait(self, selector, text="", seconds=60):
        """The first element of that kind with that text, as soon as there is one."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                for element in self.driver.find_elements("css selector", selector):
                    if text in (element.text or element.get_attribute("textContent")):
                        return element
            except StaleElementReferenceException:
                pass
            time.sleep(0.1)
        seen = [element.text for element in self.driver.find_elements("css selector", selector)]
        raise AssertionError(f"no {selector} with {text!r} in {seconds} s, but {seen}")

    def gone(self, selector, text, seconds=60):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if not any(text in element.text for element in self.all(selector)):
                    return
            except StaleElementReferenceException:
                pass
            time.sleep(0.2)
        raise AssertionError(f"{selector} still has {text!r}")

    def read(self, selector, text):
        """What stands there, once it can be seen and has that text in it: pages are drawn anew as answers come in."""
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(20):
            try:
                if text in (seen := self.wait(selector, text).text):
                    return seen
            except StaleElementReferenceException:
                pass
            time.sleep(0.5)
        raise AssertionError(f"{selector} has {text!r}, but it cannot be seen")

    def teach(self, name, pictures):
        """On the tab of lessons."""
        self.wait("#class-name textarea, #class-name input").send_keys(name)
        self.give("#lessons", *pictures)
        self.wait("#lessons", pictures[-1].name[:5])
        self.press("Teach", "button.primary")

    def press(self, text, selector="button"):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for button in self.driver.find_elements("css selector", selector):
                if button.is_displayed() and button.text.strip().startswith(text):
                    button.click()
                    return
            # on a narrow screen the last tabs are in a menu
            for menu in self.driver.find_elements("css selector", ".overflow-menu > button"):
                if selector == "button[role=tab]" and menu.is_displayed():
                    menu.click()
                    selector = "button"
            time.sleep(0.2)
        raise AssertionError(f"no button {text!r}")

    def give(self, selector, *paths):
        for old in self.all(f"{selector} button[aria-label='Remove Image']"):
            old.click()
        self.wait(f"{selector} input[type=file]").send_keys("\n".join(map(str, paths)))

    def draw(self, *points):
        from selenium.webdriver.common.action_chains import ActionChains

        canvas = self.wait("#pad canvas")
        time.sleep(2)  # the brush is taken once the canvas is there
        stroke = ActionChains(self.driver, duration=30).move_to_element_with_offset(canvas, *points[0])
        stroke.click_and_hold()
        for (x, y), (next_x, next_y) in zip(points, points[1:], strict=False):
            stroke.move_by_offset(next_x - x, next_y - y)
        stroke.release().perform()

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def barriers(self):
        """What axe finds on the page that is critical or serious for people with disabilities."""
        run = "axe.run({resultTypes: ['violations']}).then(arguments[arguments.length - 1])"
        return [
            (found["id"], found["impact"], node["html"][:200])
            for found in self.driver.execute_async_script(run)["violations"]
            for node in found["nodes"]
            if found["impact"] in ("critical", "serious")
        ]

    def overflow(self):
        """How many pixels of the page cannot be seen without scrolling sideways."""
        return self.driver.execute_script("return document.documentElement.scrollWidth") - self.width

    def outside(self):
        """Addresses asked for that are not on this machine."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        return [url for url in urls if not url.startswith(("http://127.0.0.1", "data:", "blob:"))]


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """Source of axe-core: of the file that AXE_CORE names, of a global install, or as npm gets it for this run."""
    places = [Path(os.environ["AXE_CORE"])] if "AXE_CORE" in os.environ else []
    npm = shutil.which("npm")
    if npm and not places:
        root = subprocess.run([npm, "root", "--global"], capture_output=True, text=True).stdout.strip()
        places.append(Path(root, "axe-core", "axe.min.js"))
        if not places[0].is_file():
            folder = tmp_path_factory.mktemp("npm")
            get = [npm, "install", "--prefix", folder, "--no-audit", "--no-fund", "--fetch-retries=0", AXE]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(get, capture_output=True, timeout=120)
            places.append(folder / "node_modules" / "axe-core" / "axe.min.js")
    found = [path for path in places if path.is_file()]
    if not found:
        pytest.skip("needs axe-core: a network with npm, or AXE_CORE with the path of its axe.min.js")
    return found[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def visitor():
    visitor = Visitor()
    yield visitor
    visitor.driver.quit()


def test_an_uploaded_picture_finds_its_class_and_expert(page, visitor):
    visitor.open(page)
    visitor.give("#picture", EXAMPLES / "digit-7.png")
    assert visitor.read("#verdict .verdict", "7").startswith("7")
    assert "The route is" in visitor.read("#verdict .verdict ~ p", "expert of Task 4 6, 7")
    assert [step.text.split("\n")[0] for step in visitor.all("#verdict .route li")][2:] == ["Task 4", "7"]
    assert visitor.wait("#distances .chosen").text.startswith("Task 4 6, 7")
    visitor.wait("#experts li", "Task 4")
    assert len(visitor.all("#experts li")) == 3
    assert not visitor.outside()


def test_a_drawn_digit_is_read(page, visitor):
    visitor.open(page)
    visitor.press("Draw a digit")
    visitor.draw((0, -80), (0, -40), (0, 0), (0, 40), (0, 80))
    visitor.press("Which digit is it?")
    visitor.read("#verdict .route li:last-child b", "1")
    assert visitor.read("#verdict .verdict", "%").startswith("1")


def test_a_first_example_is_there_and_answered(page, visitor):
    visitor.open(page)
    assert visitor.read("#verdict .verdict", "0").startswith("0")


def test_a_phone_shows_the_answer_directly_below_the_picture(page, visitor):
    visitor.open(page, 390)
    visitor.wait("#verdict .verdict")
    given, found, others = (visitor.wait(f"#{name}").rect for name in ("given", "found", "others"))
    assert given["y"] + given["height"] <= found["y"] < 700 and found["y"] + found["height"] <= others["y"]


def test_the_slider_goes_back_in_time(page, visitor):
    visitor.open(page)
    visitor.give("#picture", EXAMPLES / "digit-7.png")
    visitor.wait("#verdict .verdict", "7")
    visitor.press("Look inside", "button[role=tab]")
    visitor.wait("#tasks", "After task 5 of 5")
    slider = visitor.wait("#step input[type=range]")
    for _ in range(3):
        slider.send_keys("\ue012")  # the left arrow
    visitor.wait("#tasks", "After task 2 of 5")
    assert len(visitor.all("#tasks .later")) == 3
    number = visitor.wait("#step input[type=number]")
    number.send_keys("\ue009a\ue0004\ue007")  # all of it is overwritten, then Enter
    visitor.wait("#tasks", "After task 4 of 5")


def test_a_class_taught_from_five_pictures_is_recognised(page, visitor, letters):
    visitor.open(page)
    visitor.press("Teach it", "button[role=tab]")
    visitor.teach("letter A", letters[:5])
    assert "4 of your 5 pictures would be recognised" in visitor.read("#outcome", "Learnt letter A")
    assert "0 of 10 answers" in visitor.read("#outcome", "No old weight has changed")
    visitor.wait("label[data-testid=block-label]", "Your model")
    visitor.press("Try it", "button[role=tab]")
    visitor.give("#picture", letters[6])
    visitor.read("#verdict .verdict", "letter A")
    assert not visitor.outside()

    visitor.driver.refresh()
    visitor.wait("#picture img")
    visitor.wait("#distances li", "Task 6")
    visitor.give("#picture", letters[6])
    visitor.read("#verdict .verdict", "letter A")
    visitor.press("Teach it", "button[role=tab]")
    visitor.read("#outcome", "It knows 11 classes, lastly letter A")
    visitor.wait("label[data-testid=block-label]", "Your model")
    visitor.press("Forget what I taught")
    visitor.press("Try it", "button[role=tab]")
    visitor.gone("#distances li", "Task 6")
    time.sleep(2)
    visitor.driver.refresh()
    visitor.read("#verdict .verdict", "0")
    time.sleep(2)
    visitor.gone("#distances li", "Task 6", 1)


def test_what_one_tab_forgets_stays_in_another(page, visitor, letters):
    visitor.open(page)
    visitor.press("Teach it", "button[role=tab]")
    assert not any(button.is_displayed() for button in visitor.all("#forget"))  # nothing was taught yet
    visitor.teach("letter A", letters[:5])
    visitor.read("#outcome", "Now give it a new picture under Try it")
    visitor.read("#intro", "recognises 11 things")
    visitor.gone("#lessons", letters[4].name[:5])
    assert visitor.wait("#class-name textarea, #class-name input").get_attribute("value") == ""
    first = visitor.driver.current_window_handle
    visitor.driver.switch_to.new_window("tab")
    try:
        visitor.open(page)
        visitor.read("#intro", "letter A, which you taught")  # a new tab finds it
        visitor.press("Teach it", "button[role=tab]")
        visitor.press("Forget what I taught")
        visitor.read("#intro", "recognises 10 things")
    finally:
        visitor.driver.close()
        visitor.driver.switch_to.window(first)
    visitor.driver.refresh()
    visitor.read("#intro", "letter A, which you taught")
    visitor.press("Teach it", "button[role=tab]")
    visitor.press("Forget what I taught")
    visitor.read("#intro", "recognises 10 things")


def test_no_answer_to_an_old_picture_stays_beside_a_new_one(page, visitor, monkeypatch):
    def gone(models, key):
        raise VisitorError("The model you taught is not here any more.")

    visitor.open(page)
    visitor.read("#verdict .verdict", "0")
    visitor.wait("#experts li")
    monkeypatch.setattr(Models, "get", gone)
    visitor.all(".gallery-item")[7].click()
    visitor.wait("[data-testid=toast-text]", "not here any more")
    visitor.gone("#verdict", "0")
    visitor.gone("#experts", "nearest")


def test_a_heat_map_shows_where_the_model_looks(page, visitor):
    visitor.open(page)
    visitor.give("#picture", EXAMPLES / "digit-7.png")
    visitor.read("#verdict .verdict", "7")
    visitor.press("Where does it look?")
    said = visitor.read("#heat figcaption", "of the picture")
    assert visitor.wait("#heat img").get_attribute("alt") == f"Heat map. {said}"
    visitor.give("#picture", EXAMPLES / "digit-3.png")
    visitor.gone("#heat", "of the picture")
    assert not visitor.outside()


def test_the_route_shows_the_visitors_own_pictures_after_a_lesson(page, visitor, letters):
    visitor.open(page)
    visitor.press("Teach it", "button[role=tab]")
    visitor.teach("letter A", letters[:5])
    visitor.read("#outcome", "Learnt letter A")
    visitor.press("Try it", "button[role=tab]")
    visitor.give("#picture", letters[6])
    visitor.read("#verdict .route", "most like this training picture")
    assert len(visitor.all("#verdict .route img")) == 2
    visitor.press("Look inside", "button[role=tab]")
    visitor.wait("#tasks", "After task 6")
    assert len(visitor.all("#tasks img")) == 3
    visitor.press("Teach it", "button[role=tab]")
    visitor.press("Forget what I taught")
    visitor.gone("#outcome", "Learnt")
    time.sleep(2)  # the browser forgets the model
    assert not visitor.all("[data-testid=toast-text]")
    visitor.press("Look inside", "button[role=tab]")
    visitor.wait("#tasks", "After task 5")


def test_what_is_no_picture_gets_a_friendly_word(page, visitor):
    visitor.open(page)
    Path("broken.png").write_bytes(b"nothing of the kind")
    visitor.give("#picture", Path("broken.png").absolute())
    visitor.wait("[data-testid=toast-text]", "broken.png is no picture")


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_fits_on_the_screen(page, visitor, width):
    visitor.open(page, width)
    visitor.give("#picture", EXAMPLES / "digit-7.png")
    visitor.wait("#verdict .verdict", "7")
    visitor.wait("#experts li")
    long = "document.querySelectorAll('%s bdi').forEach((name) => name.textContent = 'headphone, platypus, ...')"
    visitor.driver.execute_script(long % "#verdict")
    for tab in TABS:
        visitor.press(tab, "button[role=tab]")
        if tab == "Many pictures":
            visitor.give("[role=tabpanel]:not([style*=none])", EXAMPLES / "digit-7.png", EXAMPLES / "digit-8.png")
            visitor.press("Classify")
            visitor.wait("#predictions td")
            visitor.driver.execute_script(long % "#predictions")
            assert visitor.driver.execute_script(UNDER_BUTTONS) == []
        if tab == "Look inside":
            visitor.wait("#tasks", "After task")
            names = [Name(f"Task {number}", "0, 1", "0, 1") for number in range(1, 21)]
            heat = heat_table(np.full((20, 20), 0.99), names, names, "After \\ on task, %")
            assert visitor.driver.execute_script(CUT_OFF, heat) <= 0
        time.sleep(0.5)
        assert visitor.overflow() <= 0, tab


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_on_any_tab_keeps_people_with_disabilities_out(page, visitor, axe, width, theme):
    visitor.open(page, width, theme)
    visitor.driver.set_script_timeout(60)
    visitor.wait("#experts li")
    visitor.driver.execute_script(axe)
    for tab in TABS:
        visitor.press(tab, "button[role=tab]")
        if tab == "Many pictures":
            visitor.give("[role=tabpanel]:not([style*=none])", *EXAMPLES.glob("digit-[3-5].png"))
            visitor.press("Classify")
            visitor.wait("#predictions td", "digit-4.png")
        if tab == "Look inside":
            visitor.wait("#tasks", "After task")
        time.sleep(0.5)
        assert visitor.barriers() == [], tab


def test_what_changes_is_said_and_charts_can_be_read_aloud(page, visitor):
    visitor.open(page)
    visitor.wait("#verdict .verdict")
    visitor.wait("#verdict[aria-live=polite]")
    assert (
        visitor.wait("#distances ol").get_attribute("aria-label") == "Distance to the nearest prototype of each task"
    )
    visitor.press("Look inside", "button[role=tab]")
    visitor.wait("#answer[aria-live=polite]")
    said = visitor.wait("#plane svg[role=img]").get_attribute("aria-label")
    assert "100 points" in said and "Your picture is nearest to Task 1" in said


def test_the_keyboard_is_enough(page, visitor):
    visitor.open(page)
    visitor.wait("#verdict .verdict", "0")
    visitor.all(".gallery-item")[7].send_keys("\ue007")  # Enter
    visitor.read("#verdict .verdict", "7")
    visitor.wait("button[role=tab][aria-selected=true]").send_keys("\ue004")  # Tab
    chosen = visitor.driver.switch_to.active_element
    chosen.send_keys("\ue007")
    visitor.wait("button[role=tab][aria-selected=true]", "Many pictures")
