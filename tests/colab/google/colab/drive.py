"""Google Drive: a folder of the home, shown as MyDrive at the mountpoint."""

from pathlib import Path

from google.colab import _message

mounted = []  # at most one


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    if mounted and not force_remount:
        again = f'drive.mount("{mountpoint}", force_remount=True)'
        print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call {again}.")
        return
    if _message.blocking_request(timeout_ms / 1000) is None:
        raise _message.MessageError("Error: credential propagation was unsuccessful")
    if mounted:
        flush_and_unmount()
    if Path(mountpoint).exists() and any(Path(mountpoint).iterdir()):
        raise ValueError("Mountpoint must not already contain files")
    Path(mountpoint).mkdir(parents=True, exist_ok=True)
    kept = Path.home() / "drive"
    kept.mkdir(exist_ok=True)
    mounted.append(Path(mountpoint) / "MyDrive")
    mounted[0].symlink_to(kept)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    if mounted:
        mounted.pop().unlink()
    else:
        print("Drive not mounted, so nothing to flush and unmount.")
