package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/socket"
)

// A Tunnel moves bytes both ways between two connections after an upgrade or a
// CONNECT. It runs once.
type Tunnel struct {
	// Client and Server are the two ends. Required.
	Client, Server *Conn
	// Idle is how long nothing may move either way. 0: for ever.
	Idle time.Duration
	// WebSocket says that both ends speak RFC 6455, so that Part can say
	// farewell to them.
	WebSocket bool

	start time.Time
	last  atomic.Int64 // when bytes last moved, nanoseconds from start
	once  sync.Once
	err   error         // the first failure, written once
	done  chan struct{} // closed when Run has moved its last byte; made by NewTunnel
	parts parting
}

// NewTunnel returns a tunnel for Run.
func NewTunnel(client, server *Conn, idle time.Duration) *Tunnel {
	return &Tunnel{Client: client, Server: server, Idle: idle, done: make(chan struct{})}
}

// Run moves bytes, what is buffered first, until both directions have ended. The
// end of one direction is passed on as a half close; where a connection cannot
// half close, or a direction fails, both are closed. Nothing moving either way
// for Idle ends it too with ErrIdleTimeout. Closing either connection from
// elsewhere ends it. It returns the bytes moved to the server and to the client,
// and the first failure, nil when the ends closed in order. Both connections are
// closed when it returns.
func (t *Tunnel) Run() (sent, got int64, err error) {
	t.start = time.Now()
	for _, c := range []*Conn{t.Client, t.Server} {
		c.lim.WriteTimeout = t.Idle // a receiver may pause as long as a sender
		_ = c.writeUntil(time.Time{})
	}
	var up, down *frames
	if t.WebSocket {
		up, down = &frames{masked: true}, &frames{}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		sent = t.move(t.Server, t.Client, up)
	}()
	got = t.move(t.Client, t.Server, down)
	<-done
	t.parts.look.Lock() // so that nobody touches the ends any more
	close(t.done)
	t.parts.look.Unlock()
	t.Client.Close()
	t.Server.Close()
	return sent, got, t.err
}

// stop ends both directions; the first reason given stays. After a failure
// neither end may take what it has got for the whole.
func (t *Tunnel) stop(err error) {
	t.once.Do(func() { t.err = err })
	for _, c := range []*Conn{t.Client, t.Server} {
		if err != nil && !errors.Is(err, ErrIdleTimeout) {
			c.abort()
		}
		c.Close()
	}
}

// abort closes a connection such that the peer sees a failure: without a
// farewell of TLS, and TCP by a reset.
func (c *Conn) abort() {
	nc := c.nc
	for {
		in, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		nc = in.NetConn()
	}
	if l, ok := nc.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0) // a connection that is closed already needs none
	}
	nc.Close()
}

// A lentWriter writes with fewer copies what nobody else has in his hands.
type lentWriter interface {
	WriteLent(p []byte) (int, error)
}

// move carries one direction, whose frames f follows if there are any.
func (t *Tunnel) move(dst, src *Conn, f *frames) (n int64) {
	if src.w > src.r {
		k, err := dst.Write(src.buf[src.r:src.w])
		f.follow(src.buf[src.r : src.r+k])
		src.r += k
		if n = int64(k); err != nil {
			t.stop(err)
			return n
		}
	}
	if t.Idle == 0 {
		src.readUntil(time.Time{})
	}
	from, write := socket.NewSource(src.nc), dst.nc.Write
	if l, ok := dst.nc.(lentWriter); ok {
		write = l.WriteLent
	}
	defer from.Release()
	for {
		if t.Idle > 0 {
			src.readWithin(t.Idle)
		}
		b, err := from.Next()
		if f != nil && t.parts.code.Load() != 0 {
			t.farewell(dst, src, f, from)
			return n
		}
		if len(b) > 0 {
			t.last.Store(int64(time.Since(t.start)))
			w := 0
			if err = dst.writeWithin(); err == nil {
				w, err = write(b)
			}
			f.follow(b[:w])
			if n += int64(w); err != nil {
				t.stop(err)
				return n
			}
			continue
		}
		switch {
		case err == io.EOF:
			if dst.closeWrite() != nil {
				t.stop(nil)
			}
			return n
		case errors.Is(err, os.ErrDeadlineExceeded):
			if quiet := time.Since(t.start) - time.Duration(t.last.Load()); quiet >= t.Idle {
				t.stop(ErrIdleTimeout)
				return n
			}
		default:
			t.stop(err)
			return n
		}
	}
}
