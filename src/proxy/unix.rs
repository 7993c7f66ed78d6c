//! The Unix socket that clients of this machine connect to: `.s.PGSQL.<port>` in a directory, as libpq looks for it.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::UnixSocket;

/// A listener and its file, which is removed when this is dropped.
pub(super) struct Bound {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: another process may have put its own file there since.
    file: (u64, u64),
}

/// Binds. A file that a pgflip (or a Postgres) has left which no longer lives is removed, one that somebody listens at is an
/// error.
pub(super) fn bind(socket: &UnixSocket, port: u16) -> io::Result<Bound> {
    let path = socket.directory.join(format!(".s.PGSQL.{port}"));
    let error = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    remove_if_stale(&path).map_err(error)?;
    let listener = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|e| error(e.into()))?;
    let address = SocketAddrUnix::new(&path).map_err(|e| error(e.into()))?;
    rustix::net::bind(&listener, &address).map_err(|e| error(e.into()))?;
    let file = std::fs::symlink_metadata(&path).map_err(error)?;
    let bound = Bound {
        listener: listener.into(),
        file: (file.dev(), file.ino()),
        path: path.clone(),
    };
    // Nobody can connect before it listens, and by then who may is settled.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(socket.mode)).map_err(error)?;
    rustix::net::listen(&bound.listener, super::BACKLOG).map_err(|e| error(e.into()))?;
    tracing::info!(path = %path.display(), "listening for clients of this machine");
    Ok(bound)
}

fn remove_if_stale(path: &Path) -> io::Result<()> {
    let file = match std::fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !file.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "it is there, and no socket",
        ));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        // It lives, or is so busy that it takes nobody.
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there")),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there"))
        }
        Err(error) => Err(error),
    }
}

impl Bound {
    /// The same one again, for another thread.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the Unix socket's file is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_left_is_taken_over_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixSocket {
            directory: directory.path().to_owned(),
            mode: 0o700,
        };
        let path = directory.path().join(".s.PGSQL.6432");
        // As a killed process leaves it.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = bind(&socket, 6432).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        UnixStream::connect(&path).unwrap();
        let error = bind(&socket, 6432).map(drop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("somebody listens there"), "{error}");
        drop(first);
        assert!(!path.exists());
        // What is no socket is somebody's file.
        std::fs::write(&path, "x").unwrap();
        assert_eq!(
            bind(&socket, 6432).map(drop).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        // And a file that has come in its place is not removed with it.
        let first = bind(&socket, 6432).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = bind(&socket, 6432).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }
}
