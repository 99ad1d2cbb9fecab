package http1

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Relay moves bytes both ways between a and b, what is buffered first, until
// both directions have ended. The end of one direction is passed on as a half
// close; where a connection cannot half close, or a direction fails, both are
// closed. Nothing moving either way for idle ends it too with ErrIdleTimeout
// (0: never). Closing either connection from elsewhere ends it. It returns the
// bytes moved from a to b and from b to a, and the first failure, nil when the
// ends closed in order. Both connections are closed when it returns.
func Relay(a, b *Conn, idle time.Duration) (ab, ba int64, err error) {
	s := &relayState{idle: idle, start: time.Now()}
	for _, c := range []*Conn{a, b} {
		c.lim.WriteTimeout = idle // a receiver may pause as long as a sender
		_ = c.writeUntil(time.Time{})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ab = s.move(b, a)
	}()
	ba = s.move(a, b)
	<-done
	a.Close()
	b.Close()
	return ab, ba, s.err
}

// relayState is what the two directions share.
type relayState struct {
	idle  time.Duration
	start time.Time
	last  atomic.Int64 // when bytes last moved, nanoseconds from start
	once  sync.Once
	err   error // the first failure, written once
}

// stop ends both directions; the first reason given stays.
func (s *relayState) stop(a, b *Conn, err error) {
	s.once.Do(func() { s.err = err })
	a.Close()
	b.Close()
}

func (s *relayState) move(dst, src *Conn) (n int64) {
	bulk := bulkPool.Get().(*[bulkSize]byte)
	defer bulkPool.Put(bulk)
	if src.w > src.r {
		k, err := dst.Write(src.buf[src.r:src.w])
		src.r += k
		if n = int64(k); err != nil {
			s.stop(dst, src, err)
			return n
		}
	}
	if s.idle == 0 {
		src.readUntil(time.Time{})
	}
	for {
		if s.idle > 0 {
			src.readWithin(s.idle)
		}
		k, rerr := src.nc.Read(bulk[:])
		if k > 0 {
			s.last.Store(int64(time.Since(s.start)))
			w, werr := dst.Write(bulk[:k])
			if n += int64(w); werr != nil {
				s.stop(dst, src, werr)
				return n
			}
		}
		switch {
		case rerr == nil:
		case rerr == io.EOF:
			if dst.closeWrite() != nil {
				s.stop(dst, src, nil)
			}
			return n
		case errors.Is(rerr, os.ErrDeadlineExceeded):
			if quiet := time.Since(s.start) - time.Duration(s.last.Load()); quiet >= s.idle {
				s.stop(dst, src, ErrIdleTimeout)
				return n
			}
		default:
			s.stop(dst, src, rerr)
			return n
		}
	}
}
