package egress

import (
	"container/list"
	"net"
	"sync"
)

// A wire is the connection under TLS. It can hold records back, so that a
// large write, which TLS cuts into records of 16 KiB, costs one system call.
type wire struct {
	net.Conn
	// These are guarded by Gateway.mu.
	idle bool
	who  *caller // once it has proved who it is
	over bool    // it was closed because that holds no more
	// place is where it stands among those without identity.
	place *list.Element

	closed chan struct{} // closed by Close
	once   sync.Once

	mu     sync.Mutex // guards what follows: TLS may answer while it reads
	corked bool
	held   []byte
}

// Write sends b, or holds it back.
func (w *wire) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.corked {
		w.held = append(w.held, b...)
		return len(b), nil
	}
	return w.Conn.Write(b)
}

// cork makes the writes that follow wait for uncork. Their room comes from
// buf.
func (w *wire) cork(buf []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.corked, w.held = true, buf[:0]
}

// uncork sends what was held back.
func (w *wire) uncork() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	held := w.held
	w.corked, w.held = false, nil
	if len(held) == 0 {
		return nil
	}
	_, err := w.Conn.Write(held)
	return err
}

// Close closes the connection at once, without a word of TLS.
func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}
