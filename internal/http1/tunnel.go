package http1

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
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
	close(t.done)
	t.Client.Close()
	t.Server.Close()
	return sent, got, t.err
}

// stop ends both directions; the first reason given stays.
func (t *Tunnel) stop(err error) {
	t.once.Do(func() { t.err = err })
	t.Client.Close()
	t.Server.Close()
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
	// A tunnel waits in the buffer that its connection has anyhow, and takes a
	// large one only while bytes come in large pieces.
	var bulk *[bulkSize]byte
	defer func() {
		if bulk != nil {
			bulkPool.Put(bulk)
		}
	}()
	for {
		if t.Idle > 0 {
			src.readWithin(t.Idle)
		}
		k, rerr := 0, src.hold()
		buf := src.buf
		if bulk != nil {
			buf = bulk[:]
		}
		if rerr == nil {
			k, rerr = src.nc.Read(buf)
		}
		if f != nil && t.parts.code.Load() != 0 {
			t.farewell(dst, src, f, buf)
			return n
		}
		if k > 0 {
			t.last.Store(int64(time.Since(t.start)))
			w, werr := dst.Write(buf[:k])
			f.follow(buf[:w])
			if n += int64(w); werr != nil {
				t.stop(werr)
				return n
			}
			switch {
			case bulk == nil && k == len(buf):
				bulk = bulkPool.Get().(*[bulkSize]byte)
			case bulk != nil && k < bufferSize:
				bulkPool.Put(bulk)
				bulk = nil
			}
		}
		switch {
		case rerr == nil:
		case rerr == io.EOF:
			if dst.closeWrite() != nil {
				t.stop(nil)
			}
			return n
		case errors.Is(rerr, os.ErrDeadlineExceeded):
			if quiet := time.Since(t.start) - time.Duration(t.last.Load()); quiet >= t.Idle {
				t.stop(ErrIdleTimeout)
				return n
			}
		default:
			t.stop(rerr)
			return n
		}
	}
}
