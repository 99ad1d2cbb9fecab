package record

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"

	"sallyport/internal/mux"
)

// Server makes the handshake of a server on nc, as cfg says, and takes the
// connection over. Nothing but TLS 1.3 is spoken, and no session is resumed. When
// ctx ends before the handshake has, nc is closed; on other errors it is left to
// the caller. What is computed is done in turns, if there are any.
func Server(ctx context.Context, nc net.Conn, cfg *tls.Config, turns mux.Turns) (*Conn, error) {
	if cfg.GetConfigForClient != nil {
		return nil, errors.New("handshake: GetConfigForClient is set, which could hide the secrets of the records from us")
	}
	return shake(ctx, nc, cfg, turns, false)
}

// Client is Server for the end that dialled.
func Client(ctx context.Context, nc net.Conn, cfg *tls.Config) (*Conn, error) {
	return shake(ctx, nc, cfg, nil, true)
}

// shake makes the handshake on a goroutine of its own, which ends with it: the
// one that stays with the connection is spared the deep stack.
func shake(ctx context.Context, nc net.Conn, cfg *tls.Config, turns mux.Turns, client bool) (*Conn, error) {
	c := newConn(nc)
	c.in.client = client
	side := tls.Server
	if client {
		side = tls.Client
	}
	var s secrets
	defer s.wipe()
	conf := cfg.Clone()
	conf.MinVersion, conf.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
	conf.SessionTicketsDisabled, conf.ClientSessionCache = true, nil
	conf.KeyLogWriter = &s
	var (
		sh    = &shim{Conn: nc, c: c, turns: turns}
		state tls.ConnectionState
		err   error
		crash any
	)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { crash = recover() }()
		defer sh.give()
		tc := side(sh, conf)
		if err = tc.Handshake(); err == nil {
			state = tc.ConnectionState()
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
		nc.Close()
		<-done
		err = ctx.Err()
	}
	if crash != nil {
		c.in.drop()
		panic(crash) // where whoever serves the connection can keep it to that
	}
	if err == nil {
		err = c.takeOver(sh, &state, &s)
	}
	if err != nil {
		c.in.drop()
		return nil, err
	}
	return c, nil
}

// takeOver makes the keys of both directions.
func (c *Conn) takeOver(sh *shim, state *tls.ConnectionState, s *secrets) error {
	if sh.have != 0 || sh.rest != 0 {
		return errors.New("handshake ended in the middle of a record")
	}
	var err error
	if c.suite, err = suiteOf(state.CipherSuite); err != nil {
		return err
	}
	if s.ofClient != c.suite.size || s.ofServer != c.suite.size {
		return fmt.Errorf("handshake gave secrets of %d and %d bytes, want %d", s.ofClient, s.ofServer, c.suite.size)
	}
	in, out := s.client[:s.ofClient], s.server[:s.ofServer]
	if c.in.client {
		in, out = out, in
	}
	if err := c.in.set(c.suite, in); err != nil {
		return err
	}
	if err := c.out.set(c.suite, out); err != nil {
		return err
	}
	c.in.updates = mux.NewBucket(updatesBurst, updatesRate)
	c.state = share(state)
	return nil
}

// A shim is the connection that crypto/tls makes the handshake on. It gives no
// more than up to the end of a record, so that nothing of what follows the
// handshake is inside crypto/tls.
type shim struct {
	net.Conn
	c *Conn
	// head is that of the record which is being read, have of it was given, and
	// rest is left of what follows.
	head [headerSize]byte
	have int
	rest int
	// turns are for what the handshake computes of what was read, mine says that
	// such a turn is under way: never while it waits for the peer.
	turns mux.Turns
	mine  bool
}

func (s *shim) take() {
	s.turns.Take()
	s.mine = s.turns != nil
}

func (s *shim) give() {
	if s.mine {
		s.mine = false
		s.turns.Give()
	}
}

// Write sends what was computed.
func (s *shim) Write(p []byte) (int, error) {
	if s.mine {
		s.give()
		defer s.take()
	}
	return s.Conn.Write(p)
}

// Read gives what is left of a record.
func (s *shim) Read(p []byte) (int, error) {
	in := &s.c.in
	if len(p) == 0 {
		return 0, nil
	}
	if in.r == in.w {
		s.give()
		err := s.c.fill()
		s.take()
		if err == io.ErrUnexpectedEOF {
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
	}
	b := in.buf.Bytes[in.r:in.w]
	n := copy(p, b[:s.within(b[:min(len(b), len(p))])])
	if in.r += n; in.r == in.w {
		in.drop()
	}
	return n, nil
}

// within is how many bytes of b belong to the record that is being read.
func (s *shim) within(b []byte) int {
	n := 0
	if s.rest == 0 {
		n = copy(s.head[s.have:], b)
		if s.have += n; s.have < headerSize {
			return n
		}
		s.have, s.rest = 0, int(s.head[3])<<8|int(s.head[4])
	}
	more := min(s.rest, len(b)-n)
	s.rest -= more
	return n + more
}
