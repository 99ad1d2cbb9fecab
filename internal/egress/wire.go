package egress

import (
	"container/list"
	"net"
	"sync"
)

// A wire is the connection under TLS.
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
}

// Close closes the connection at once, without a word of TLS.
func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}
