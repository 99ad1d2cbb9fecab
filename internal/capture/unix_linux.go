package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A UnixListener accepts connections on a Unix socket and knows, for each
// message, which process wrote it.
type UnixListener struct{ *net.UnixListener }

// maxSocketPath is what fits into sockaddr_un (unix(7)).
const maxSocketPath = 107

// ListenUnix listens on path, whose file has the mode perm from the first
// moment (bind takes the mode of the unbound socket). A socket that nobody
// listens on any more is replaced; one in use is an error.
func ListenUnix(path string, perm fs.FileMode) (*UnixListener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: the path has %d bytes, that of a socket at most %d: choose a shorter one", path, len(path), maxSocketPath)
	}
	if err := clearStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		if cerr := rc.Control(func(fd uintptr) {
			if err = unix.Fchmod(int(fd), uint32(perm.Perm())); err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
			}
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, perm.Perm()); err != nil { // the umask may have taken bits away
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &UnixListener{l.(*net.UnixListener)}, nil
}

// AdoptUnix is ListenUnix for a socket that another process has opened so.
func AdoptUnix(l *net.UnixListener) (*UnixListener, error) {
	rc, err := l.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("adopt socket: %w", err)
	}
	var serr error
	if err := rc.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}); err != nil || serr != nil {
		return nil, fmt.Errorf("adopt socket: %w", errors.Join(err, serr))
	}
	return &UnixListener{l}, nil
}

// clearStale removes a socket file that refuses connections.
func clearStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: a file that is not a socket stands there: remove it or choose another path", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("listen on %s: another process listens there: stop it or choose another path", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listen on %s: remove stale socket: %w", path, err)
	}
	return nil
}

// Accept waits for a connection. Its dynamic type is *UnixPeer. A peer that
// cannot be named is closed and passed over, so that it cannot stop the rest.
func (l *UnixListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		p, err := NewUnixPeer(c)
		if err != nil {
			c.Close()
			continue
		}
		return p, nil
	}
}

// A UnixPeer is a Unix stream connection whose every message must come from
// the process that opened it. One Read never joins bytes of two writers: the
// kernel keeps them apart while SO_PASSCRED is set.
//
// It is a net.Conn and no more: the other methods of net.UnixConn would read
// past the check.
type UnixPeer struct {
	net.Conn
	uc   *net.UnixConn
	cred Cred
}

// NewUnixPeer wraps an accepted connection. It owns c only on success.
func NewUnixPeer(c *net.UnixConn) (*UnixPeer, error) {
	cred, err := PeerCred(c)
	if err != nil {
		return nil, err
	}
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("ask for sender credentials: %w", err)
	}
	var serr error
	if err := rc.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}); err != nil || serr != nil {
		return nil, fmt.Errorf("ask for sender credentials: %w", errors.Join(err, serr))
	}
	return &UnixPeer{Conn: c, uc: c, cred: cred}, nil
}

// Cred is who opened the connection.
func (p *UnixPeer) Cred() Cred { return p.cred }

// Pidfd takes hold of the process that opened the connection.
func (p *UnixPeer) Pidfd() (*Pidfd, error) { return PeerPidfd(p.uc) }

// Read reads as net.Conn does. When the bytes come from another process, or
// the message carries file descriptors, it delivers nothing, closes the
// connection and returns ErrSenderChanged or an error saying so.
func (p *UnixPeer) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	// Room for the credentials alone: the kernel drops descriptors that do not
	// fit and says so with MSG_CTRUNC.
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	n, on, flags, _, err := p.uc.ReadMsgUnix(b, oob)
	if errors.Is(err, io.EOF) || err == nil && n == 0 {
		return 0, io.EOF // ReadMsgUnix wraps it; its credentials are nobody's
	}
	if err != nil {
		return 0, err
	}
	if err := p.checkSender(oob[:on], flags); err != nil {
		clear(b[:n])
		p.Close()
		return 0, err
	}
	return n, nil
}

func (p *UnixPeer) checkSender(oob []byte, flags int) error {
	if flags&unix.MSG_CTRUNC != 0 {
		return errors.New("message carries more than its sender's credentials: file descriptors are not accepted")
	}
	h, data, _, err := unix.ParseOneSocketControlMessage(oob)
	if err != nil || h.Level != unix.SOL_SOCKET || h.Type != unix.SCM_CREDENTIALS {
		return fmt.Errorf("message without sender credentials: %w", ErrSenderChanged)
	}
	u, err := unix.ParseUnixCredentials(&unix.SocketControlMessage{Header: h, Data: data})
	if err != nil {
		return fmt.Errorf("read sender credentials: %w", err)
	}
	if int(u.Pid) != p.cred.PID {
		return fmt.Errorf("pid %d opened, pid %d wrote: %w", p.cred.PID, u.Pid, ErrSenderChanged)
	}
	return nil
}
