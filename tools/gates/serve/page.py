"""The page of `lnv serve` in Chromium, used as a person would use it.

    LNV=lnv CHROMIUM=chromium [SHOTS=folder] python page.py SMOLLM2_FOLDER

Throughout: nothing is asked of another host, and the browser's console has no error but those that a check
expects.
"""

import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from server import DEMO, Checks, Server

KEY = "sesame"
LONG = "Write a very long story about a village by the sea."


class Web:
    """A server of others: hands out the demo's files as long as it is `open`."""

    def __enter__(self):
        self.open = True
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                file = DEMO / self.path.lstrip("/")
                found = web.open and file.is_file()
                body = file.read_bytes() if found else b""
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()


class Visit:
    """One tab. `errors` collects what the console says; `hosts` whom it asks."""

    def __init__(self, browser, server, width=1100, height=800, scheme="light", **more):
        self.server = server
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **more
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        # File choosers are caught from the first on, not only from when one is waited for.
        self.page.on("filechooser", lambda _: None)
        self.errors, self.hosts = [], set()
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.errors.append(m.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def __enter__(self):
        self.page.goto(self.server.url)
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.shot("failed")
        self.context.close()
        if kind is None:
            assert not self.errors, self.errors
            # blob: and data: have no host.
            assert self.hosts <= {urlsplit(self.server.url).netloc, ""}, self.hosts

    @contextmanager
    def expecting(self, part):
        """The console says this much, as the browser does of any response that is no success."""
        before = len(self.errors)
        yield
        told = self.errors[before:]
        assert told and all(part in error for error in told), told
        del self.errors[before:]

    def shot(self, name):
        if folder := os.environ.get("SHOTS"):
            size = self.page.viewport_size
            self.page.screenshot(path=Path(folder) / f"{name}-{size['width']}.png")

    def choose(self, *names):
        """Files by the file chooser, as a person picks them; waits for their thumbnails."""
        at = "#drop" if self.page.locator("#drop").is_visible() else "#attach"
        with self.page.expect_file_chooser() as chooser:
            self.page.click(at)
        chooser.value.set_files([DEMO / name for name in names])
        for card in self.page.locator("#tray .card").all():
            expect(card.locator(".strip img").first).to_be_visible()

    def link(self, url):
        """A link, as a person types it."""
        self.page.click("#link")
        expect(self.page.locator("#linker")).to_be_visible()
        self.page.keyboard.type(url)
        self.page.keyboard.press("Enter")

    def type(self, question):
        self.page.locator("#question").fill(question)
        self.page.keyboard.press("Enter")

    def answer(self):
        """The last answer, once it is complete."""
        last = self.page.locator(".turn").last
        expect(last.locator("details")).to_be_visible()
        return last.locator(".text").inner_text().strip()

    def ask(self, question):
        turns = self.page.locator(".turn").count()
        self.type(question)
        expect(self.page.locator(".turn")).to_have_count(turns + 1)
        return self.answer()

    def overflow(self):
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


def a_clip_is_shown_as_its_frames(browser, server):
    with Visit(browser, server) as visit:
        expect(visit.page.locator("#ideas button").first).to_be_visible()
        visit.shot("empty")
        visit.choose("left.mp4")
        frames = visit.page.locator("#tray .strip button")
        expect(frames).to_have_count(8)
        widths = visit.page.eval_on_selector_all("#tray .strip img", "all => all.map(img => img.naturalWidth)")
        assert all(0 < width <= 160 for width in widths), widths
        times = visit.page.locator("#tray .strip span").all_inner_texts()
        assert times[0] == "0:00.0" and times == sorted(set(times)), times
        visit.shot("card")
        for _ in range(4):
            visit.page.get_by_role("button", name="Fewer frames").click()
        expect(frames).to_have_count(4)
        visit.page.get_by_label("Frames of left.mp4").and_(visit.page.locator("input")).fill("6")
        expect(frames).to_have_count(6)
        visit.page.get_by_label("From second").fill("0.5")
        expect(visit.page.locator("#tray .strip span").first).not_to_have_text("0:00.0")
        with visit.expecting("status of 400"):
            visit.page.get_by_label("to", exact=True).fill("0.1")
            expect(visit.page.locator("#tray .wrong")).not_to_be_empty()
        visit.shot("refused")
        return visit.page.locator("#tray .wrong").inner_text()


def answers_stream_and_the_chat_goes_on(browser, server):
    with Visit(browser, server) as visit:
        visit.page.evaluate(
            """window.seen = []; new MutationObserver(() => {
                const text = document.querySelector('.turn:last-child .text')?.textContent;
                if (text && text !== seen.at(-1)) seen.push(text);
            }).observe(document.querySelector('#chat'), {childList: true, subtree: true, characterData: true})"""
        )
        # The answer is written in some hundredths of a second, in which a busy browser may paint once.
        for _ in range(5):
            visit.choose("left.mp4")
            assert visit.ask("Describe the video.") == "a red circle moves to the left on a white background"
            steps = visit.page.evaluate("seen.splice(0)")
            assert all(b.startswith(a) for a, b in zip(steps, steps[1:])), steps
            if len(steps) >= 3:
                break
            visit.page.click("#new-chat")
        assert len(steps) >= 3, steps
        visit.shot("answer")
        figures = visit.page.locator(".turn details").inner_text()
        for word in ("tokens", "tokens/s", "Media", "Looking", "Prompt", "Answering"):
            assert word in figures, figures
        assert visit.ask("Which way does it move?")
        visit.shot("second")
        cached = visit.page.locator(".turn").last.locator("dl div", has_text="cached").locator("dd").inner_text()
        assert int(cached.replace(",", "")) > 0, cached
        assert visit.page.locator("#question").input_value() == ""
        visit.page.reload()
        expect(visit.page.locator(".turn")).to_have_count(2)
        assert "a red circle" in visit.page.locator(".turn .text").first.inner_text()
        visit.page.click("#new-chat")
        expect(visit.page.locator(".turn")).to_have_count(0)
        expect(visit.page.locator("#drop")).to_be_visible()
        return f"{len(steps)} steps, {cached} tokens found in the cache"


def the_examples_are_answered(browser, server):
    for name, question, wanted in (
        ("left.mp4", "Which way does it move?", "left"),
        ("three.mp4", "How many shapes are there?", "three"),
        ("circle.png", "What shape is it?", "circle"),
    ):
        with Visit(browser, server) as visit:
            visit.choose(name)
            got = visit.ask(question)
            assert got == wanted, (name, question, got)


def files_are_dropped_and_pasted(browser, server):
    with Visit(browser, server) as visit:
        picture = list((DEMO / "circle.png").read_bytes())
        for target, event in (("#scroll", "drop"), ("#question", "paste")):
            visit.page.evaluate(
                """([target, kind, bytes]) => {
                    const data = new DataTransfer();
                    data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, {type: 'image/png'}));
                    const how = {bubbles: true, cancelable: true};
                    const event = kind === 'drop'
                        ? new DragEvent('drop', {...how, dataTransfer: data})
                        : new ClipboardEvent('paste', {...how, clipboardData: data});
                    document.querySelector(target).dispatchEvent(event);
                }""",
                [target, event, picture],
            )
        expect(visit.page.locator("#tray .strip img")).to_have_count(2)
        visit.page.get_by_role("button", name="Remove paste.png").click()
        assert visit.ask("What colour is it?") == "red"


def mistakes_are_told_and_nothing_is_lost(browser, server):
    with Visit(browser, server) as visit:
        broken = {"name": "broken.mp4", "mimeType": "video/mp4", "buffer": b"no video at all" * 100}
        with visit.expecting("status of 400"):
            visit.page.set_input_files("#files", [broken])
            expect(visit.page.locator("#tray .wrong")).not_to_be_empty()
        why = visit.page.locator("#tray .wrong").inner_text()
        visit.type("What is it?")
        expect(visit.page.locator("#problem")).to_be_visible()
        assert visit.page.locator("#question").input_value() == "What is it?"
        expect(visit.page.locator(".turn")).to_have_count(0)
        visit.shot("mistake")
        visit.page.get_by_role("button", name="Remove broken.mp4").click()

        visit.choose("circle.png")
        with visit.expecting("ERR_"):
            visit.context.set_offline(True)
            visit.type("What shape is it?")
            expect(visit.page.locator("#problem")).to_contain_text("cannot be reached")
            visit.context.set_offline(False)
        assert visit.page.locator("#question").input_value() == "What shape is it?"
        expect(visit.page.locator("#tray .card")).to_have_count(1)
        visit.page.keyboard.press("Enter")
        assert visit.answer() == "circle"
        return why


def links_are_fetched_by_the_server(browser, _):
    with Web() as web, Server("--allow-private-addresses") as server, Visit(browser, server) as visit:
        page = visit.page
        visit.link("left.mp4")
        # It is no address, and the browser says so.
        expect(page.locator("#linker")).to_be_visible()
        page.locator("#linker input").fill(f"{web.url}/left.mp4")
        visit.shot("link")
        page.keyboard.press("Enter")
        expect(page.locator("#linker")).not_to_be_visible()
        expect(page.locator("#tray .strip button")).to_have_count(8)
        assert page.locator("#tray .card b").inner_text() == "left.mp4"
        assert visit.ask("Which way does it move?") == "left"
        visit.shot("linked")
        # Known by its address, it is still there after the page was loaded again, and fetched again if need be.
        page.reload()
        page.get_by_role("button", name="Ask about left.mp4 again, with other frames").click()
        page.get_by_role("button", name="Fewer frames").click()
        expect(page.locator("#tray .strip button")).to_have_count(7)
        page.get_by_role("button", name="Remove left.mp4").click()

        web.open = False
        with visit.expecting("status of 400"):
            visit.link(f"{web.url}/circle.png")
            expect(page.locator("#tray .wrong")).to_contain_text("404")
        visit.shot("link-refused")
        why = page.locator("#tray .wrong").inner_text()
        web.open = True
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#tray .strip img")).to_have_count(1)
        assert visit.ask("What shape is it?") == "circle"
        return why


def links_inside_are_refused(browser, server):
    with Visit(browser, server) as visit:
        with visit.expecting("status of 400"):
            visit.link("http://127.0.0.1:8000/clip.mp4")
            expect(visit.page.locator("#tray .wrong")).to_contain_text("may not be fetched from")
        expect(visit.page.get_by_role("button", name="Try again")).not_to_be_visible()
        return visit.page.locator("#tray .wrong").inner_text()


def what_the_server_forgot_is_sent_again(browser, _):
    """Starts the server anew, at the same address, in the middle of a chat."""
    with Web() as web, Server("--allow-private-addresses") as server, Visit(browser, server) as visit:
        visit.choose("left.mp4")
        visit.link(f"{web.url}/circle.png")
        expect(visit.page.locator("#tray .strip img")).to_have_count(9)
        assert visit.ask("Which way does it move?")

        def anew(last):
            assert last.terminate() == 0
            last.terminate = lambda: 0
            other = Server(*last.arguments)
            other.port, other.url = last.port, last.url
            return other

        with anew(server) as second:
            with visit.expecting("status of 400"):
                assert visit.ask("What colour is it?")
            # Both were sent again: the file from the browser, the picture from its link.
            assert second.metrics()["lnv_upload_bytes"] > 0
            visit.page.click("#new-chat")
            visit.choose("left.mp4")
            with anew(second):
                with visit.expecting("status of 404"):
                    visit.page.get_by_role("button", name="Fewer frames").click()
                    expect(visit.page.locator("#tray .strip button")).to_have_count(7)
                assert visit.ask("Which way does it move?") == "left"
                visit.shot("sent-again")


def a_key_is_asked_for(browser, server):
    with Visit(browser, server) as visit:
        expect(visit.page.locator("#key-asker")).to_be_visible()
        visit.shot("key")
        visit.page.keyboard.type("wrong")
        visit.page.keyboard.press("Enter")
        # Asked again, until it is right.
        expect(visit.page.locator("#key-asker input")).to_have_value("")
        visit.page.keyboard.type(KEY)
        visit.page.keyboard.press("Enter")
        expect(visit.page.locator("#model")).not_to_be_empty()
        visit.errors.clear()
        visit.choose("circle.png")
        assert visit.ask("What colour is it?") == "red"


def a_keyboard_is_enough(browser, server):
    with Visit(browser, server) as visit:
        page, press = visit.page, visit.page.keyboard.press
        expect(page.locator("#ideas button").first).to_be_visible()

        def focused():
            return page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")

        def tab_to(name):
            for _ in range(40):
                press("Tab")
                if focused() == name:
                    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                    assert ring != "none" or name == "question", name
                    return
            raise AssertionError(f"{name} is not reached")

        press("Tab")
        press("Enter")
        assert focused() == "question", focused()
        tab_to("drop")
        with page.expect_file_chooser() as chooser:
            press("Enter")
        chooser.value.set_files([DEMO / "left.mp4"])
        expect(page.locator("#tray .strip button")).to_have_count(8)
        tab_to("Frame 1 of 8, at 0:00.0")
        press("ArrowRight")
        press("ArrowRight")
        assert focused().startswith("Frame 3 of 8"), focused()
        press("Enter")
        expect(page.locator("#viewer")).to_be_visible()
        visit.shot("viewer")
        press("Escape")
        expect(page.locator("#viewer")).not_to_be_visible()
        assert focused().startswith("Frame 3 of 8"), focused()
        tab_to("Fewer frames")
        press("Enter")
        expect(page.locator("#tray .strip button")).to_have_count(7)
        tab_to("question")
        page.keyboard.type("What colour is it?")
        press("Enter")
        assert visit.answer() == "red"
        assert focused() == "question", focused()
        tab_to("open-settings")
        press("Enter")
        expect(page.locator("#settings")).to_be_visible()
        visit.shot("settings")
        page.keyboard.type("Be brief.")
        press("Escape")
        assert focused() == "open-settings", focused()


def phones_have_room_for_it(browser, server):
    for width, scheme in ((360, "dark"), (320, "light"), (360, "light"), (1100, "dark")):
        with Visit(browser, server, width, 720, scheme, has_touch=width < 600) as visit:
            expect(visit.page.locator("#ideas button").first).to_be_visible()
            visit.shot(f"{scheme}-1-empty")
            assert visit.overflow() <= 0
            visit.choose("left.mp4", "pair.jpg")
            assert visit.overflow() <= 0
            visit.shot(f"{scheme}-2-card")
            assert visit.ask("Describe the video.")
            assert visit.overflow() <= 0
            visit.shot(f"{scheme}-3-answer")
            box = visit.page.locator("#question").bounding_box()
            assert box["y"] + box["height"] <= 720, box
            page = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, page[4:-1].split(",")[:3])) > 380
            assert light == (scheme == "light"), (scheme, page)
            visit.page.click("#open-settings")
            visit.shot(f"{scheme}-4-settings")
            assert visit.overflow() <= 0


def nothing_hinders_people(browser, server):
    found = []
    for scheme in ("light", "dark"):
        with Visit(browser, server, scheme=scheme) as visit:
            expect(visit.page.locator("#ideas button").first).to_be_visible()
            found += violations(visit)
            visit.choose("left.mp4", "pair.jpg")
            found += violations(visit)
            visit.ask("Describe the video.")
            found += violations(visit)
            visit.page.click("#open-settings")
            found += violations(visit)
    assert not found, found


def violations(visit):
    said = Axe().run(visit.page).response["violations"]
    return [(one["id"], [node["html"][:160] for node in one["nodes"]]) for one in said]


def an_answer_is_stopped(browser, server):
    with Visit(browser, server) as visit:
        expect(visit.page.locator("#model")).not_to_be_empty()
        for how in ("click", "key"):
            # The model is small: asked for a second story, it may well write a short one.
            if visit.page.locator("#new-chat").is_enabled():
                visit.page.click("#new-chat")
            visit.type(LONG)
            text = visit.page.locator(".turn").last.locator(".text")
            expect(text).to_have_text(re.compile(".{80}", re.DOTALL))
            if how == "click":
                visit.shot("running")
                visit.page.click("#stop")
            else:
                visit.page.keyboard.press("Escape")
            expect(visit.page.locator("#send")).to_be_visible()
            expect(visit.page.locator(".turn").last).to_contain_text("Stopped.")
            kept = text.inner_text()
            visit.server.quiet(within_s=5)
            assert text.inner_text() == kept and len(kept) > 80
            # What there was of it is told.
            figures = visit.page.locator(".turn").last.locator("details").inner_text()
            tokens = int(re.search(r"Answer tokens\s+([\d,]+)", figures)[1].replace(",", ""))
            assert 10 < tokens < len(kept), figures
            assert re.search(r"\d\s(ms|s)\b", figures) and "tokens/s" in figures, figures
        visit.shot("stopped")
        # Stopped before a word was there: the question is back in its box.
        visit.type(LONG)
        visit.page.keyboard.press("Escape")
        expect(visit.page.locator("#send")).to_be_visible()
        if visit.page.locator(".turn").count() == 1:
            assert visit.page.locator("#question").input_value() == LONG
        # And the chat goes on.
        visit.page.locator("#question").fill("")
        assert visit.ask("What is the capital of France?")
        visit.shot("after")


def a_vanished_server_is_told_of(browser, _):
    """Ends the server while it answers."""
    with Server("--model", sys.argv[1]) as server, Visit(browser, server) as visit:
        expect(visit.page.locator("#model")).not_to_be_empty()
        visit.type(LONG)
        expect(visit.page.locator(".turn .text")).to_have_text(re.compile(".{40}", re.DOTALL))
        server.process.kill()
        expect(visit.page.locator("#problem")).to_be_visible()
        assert len(visit.page.locator(".turn .text").inner_text()) >= 40
        visit.shot("vanished")
        visit.errors.clear()
        said = visit.page.locator("#problem p").inner_text()
        server.process.wait()
        server.terminate = lambda: 0
        return said


def main():
    checks = Checks()
    with sync_playwright() as play:
        # Root has no sandbox; nothing but our own page is opened.
        browser = play.chromium.launch(
            executable_path=os.environ["CHROMIUM"], args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        with Server() as server:
            for check in (
                a_clip_is_shown_as_its_frames,
                answers_stream_and_the_chat_goes_on,
                the_examples_are_answered,
                files_are_dropped_and_pasted,
                mistakes_are_told_and_nothing_is_lost,
                links_inside_are_refused,
                a_keyboard_is_enough,
                phones_have_room_for_it,
                nothing_hinders_people,
            ):
                checks.run(check, browser, server)
            server.quiet()
        checks.run(links_are_fetched_by_the_server, browser, None)
        checks.run(what_the_server_forgot_is_sent_again, browser, None)
        with Server("--api-key", KEY) as server:
            checks.run(a_key_is_asked_for, browser, server)
        with Server("--model", sys.argv[1]) as server:
            checks.run(an_answer_is_stopped, browser, server)
        checks.run(a_vanished_server_is_told_of, browser, None)
        browser.close()
    checks.end()


main()
