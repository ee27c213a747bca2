//! How much memory this process takes and could take, where the system tells (Linux).

/// Most bytes of memory that the process had at once since it started or since [`reset_peak`]: its own
/// and those of mapped files.
pub fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    line_of(&status, "VmHWM:")
}

/// Bytes of memory that the process has now.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    line_of(&status, "VmRSS:")
}

/// Bytes of memory that a program can still have without pushing others out.
pub fn available() -> Option<u64> {
    let told = std::fs::read_to_string("/proc/meminfo").ok()?;
    line_of(&told, "MemAvailable:")
}

/// Bytes of the processor's largest cache.
pub fn largest_cache() -> Option<u64> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let size = |cache: std::fs::DirEntry| -> Option<u64> {
        let text = std::fs::read_to_string(cache.path().join("size")).ok()?;
        let kib: u64 = text.trim().strip_suffix('K')?.parse().ok()?;
        Some(kib << 10)
    };
    caches.flatten().filter_map(size).max()
}

/// The bytes on the line that begins with `name`.
pub fn line_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Begins to look for the peak anew. Where the system has no such thing the old peak counts on.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
