package egress

import (
	"net"
	"sync"

	"sallyport/internal/hop"
	"sallyport/internal/mux"
)

// A wire is the connection under TLS.
type wire struct {
	net.Conn
	// These are guarded by Gateway.mu.
	idle bool
	who  *caller // once it has proved who it is
	over bool    // it was closed because that holds no more
	// shared is what has the streams, when they carry the tunnels.
	shared *hop.Conn

	// from is where it comes from, place where it waits until it has an identity.
	from  mux.Source
	place *mux.Place

	closed chan struct{} // closed by Close
	once   sync.Once
}

// Close closes the connection at once, without a word of TLS.
func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}

// reset closes the connection such that the peer sees a failure: a bare end
// would look like an orderly one.
func (w *wire) reset() {
	if tc, ok := w.Conn.(*net.TCPConn); ok {
		_ = tc.SetLinger(0)
	}
	w.Close()
}
