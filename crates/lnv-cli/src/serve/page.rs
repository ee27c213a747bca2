//! The web page: its files, built into the program.
//!
//! Decision: what is written in `page/` is what is served, without a build step; nothing is read from disk
//! when it runs, so that the program stays one file. Addresses within the page are relative, so that it works
//! behind a proxy that adds a folder.

macro_rules! file {
    ($name:literal, $kind:literal) => {
        (
            concat!("/page/", $name),
            $kind,
            include_bytes!(concat!("page/", $name)),
        )
    };
}

/// Address, type, bytes.
pub const FILES: [(&str, &str, &[u8]); 8] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_bytes!("page/index.html"),
    ),
    file!("app.js", "text/javascript; charset=utf-8"),
    file!("chat.js", "text/javascript; charset=utf-8"),
    file!("dom.js", "text/javascript; charset=utf-8"),
    file!("media.js", "text/javascript; charset=utf-8"),
    file!("server.js", "text/javascript; charset=utf-8"),
    file!("style.css", "text/css; charset=utf-8"),
    file!("icon.svg", "image/svg+xml; charset=utf-8"),
];
