package main

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/bench/rig"
	"sallyport/internal/hop"
)

// The kinds of an order.
const (
	kindCold = "cold" // a connection, a tunnel, a byte and its echo, the end
	kindWarm = "warm" // the same on what is kept: connections with streams, or sessions of TLS
	kindBulk = "bulk" // bytes that come through tunnels
	kindIdle = "idle" // tunnels that are opened and left alone
)

// An order is what the load process is asked to do.
type order struct {
	Kind    string        `json:"kind"`
	Proxy   string        `json:"proxy"`
	Host    string        `json:"host"`    // that CONNECT asks for
	SVID    string        `json:"svid"`    // the file with certificates and key; none: the proxy speaks in clear text
	Streams bool          `json:"streams"` // the proxy takes many tunnels on a connection
	Callers int           `json:"callers"`
	Warm    time.Duration `json:"warm"` // not counted
	For     time.Duration `json:"for"`
}

const (
	within = 10 * time.Second // bounds one tunnel
	// perConn is how many tunnels share a connection.
	perConn = 200
)

// A client makes tunnels for one caller.
type client struct {
	order
	tls   *tls.Config
	conns []*hop.Conn
}

func (o order) client() (*client, error) {
	c := &client{order: o}
	if o.SVID == "" {
		return c, nil
	}
	cert, err := tls.LoadX509KeyPair(o.SVID, o.SVID)
	if err != nil {
		return nil, err
	}
	// Whom it reaches is no question of this bench.
	c.tls = &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, CurvePreferences: []tls.CurveID{tls.X25519}}
	if o.Kind == kindWarm {
		c.tls.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	}
	return c, nil
}

func (c *client) dial(alpn ...string) (net.Conn, error) {
	nc, err := net.Dial("tcp", c.Proxy)
	if err != nil || c.tls == nil {
		return nc, err
	}
	conf := c.tls
	if len(alpn) > 0 {
		conf = conf.Clone()
		conf.NextProtos = alpn
	}
	tc := tls.Client(nc, conf)
	_ = tc.SetDeadline(time.Now().Add(within))
	if err := tc.Handshake(); err != nil {
		nc.Close()
		return nil, err
	}
	_ = tc.SetDeadline(time.Time{})
	return tc, nil
}

// shares says whether tunnels are streams of a connection. Bulk goes over one of
// its own, as Squid carries it.
func (c *client) shares() bool { return c.Streams && (c.Kind == kindWarm || c.Kind == kindIdle) }

// tunnel opens one.
func (c *client) tunnel() (nc net.Conn, err error) {
	if c.shares() {
		nc, err = c.stream()
	} else {
		nc, err = c.dial()
	}
	if err != nil {
		return nil, err
	}
	_ = nc.SetDeadline(time.Now().Add(within))
	if err := connect(nc, c.Host); err != nil {
		nc.Close()
		return nil, err
	}
	return nc, nil
}

func (c *client) stream() (net.Conn, error) {
	for _, h := range c.conns {
		if h.Live() && h.Room() > 0 {
			return h.Open()
		}
	}
	nc, err := c.dial(hop.Proto)
	if err != nil {
		return nil, err
	}
	h := hop.Dialled(nc, hop.Config{})
	go func() { _ = h.Run() }() // until close
	c.conns = append(c.conns, h)
	return h.Open()
}

func (c *client) close() {
	for _, h := range c.conns {
		h.Close()
	}
}

// connect asks for a tunnel. What comes behind the answer must have been asked
// for, so that no byte of it is here yet.
func connect(nc net.Conn, host string) error {
	if _, err := fmt.Fprintf(nc, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", host, host); err != nil {
		return err
	}
	br := bufio.NewReader(nc)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || br.Buffered() > 0 {
		return errors.New(strings.TrimSpace("CONNECT was answered with " + resp.Status))
	}
	return nil
}

// setUp opens a tunnel, has a byte echoed and ends it in order.
func (c *client) setUp() error {
	nc, err := c.tunnel()
	if err != nil {
		return err
	}
	defer nc.Close()
	b := []byte{'x'}
	if _, err := nc.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(nc, b); err != nil || b[0] != 'x' {
		return fmt.Errorf("the echo of 'x' was %q: %w", b, err)
	}
	if h, ok := nc.(interface{ CloseWrite() error }); ok {
		_ = h.CloseWrite()
		_, _ = nc.Read(b)
	}
	return nil
}

// run carries an order out.
func (o order) run(warm func()) rig.Tally {
	return rig.Count(o.Callers, o.Warm, o.For, warm, func(made *atomic.Int64, over *atomic.Bool) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		defer c.close()
		return c.work(made, over)
	})
}

func (c *client) work(made *atomic.Int64, over *atomic.Bool) error {
	switch c.Kind {
	case kindBulk:
		return c.fetch(made, over)
	case kindIdle:
		for range perConn {
			nc, err := c.tunnel()
			if err != nil {
				return err
			}
			defer nc.Close()
			made.Add(1)
		}
		for !over.Load() {
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	}
	for !over.Load() {
		if err := c.setUp(); err != nil {
			return err
		}
		made.Add(1)
	}
	return nil
}

// fetch has the origin send for as long as it is told.
func (c *client) fetch(made *atomic.Int64, over *atomic.Bool) error {
	nc, err := c.tunnel()
	if err != nil {
		return err
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Time{})
	if _, err := nc.Write([]byte{flood}); err != nil {
		return err
	}
	b := make([]byte, 256<<10)
	for !over.Load() {
		n, err := nc.Read(b)
		if err != nil {
			return err
		}
		made.Add(int64(n))
	}
	return nil
}

// flood, as its first byte, has the origin send without end.
const flood = 'f'

// serveOrigin is the host outside: it sends back what comes, or floods.
func serveOrigin(address string) error {
	return rig.Serve(address, func(c net.Conn) {
		b := make([]byte, 64)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			for big := b[:n]; b[0] == flood; {
				if len(big) < 1<<18 {
					big = make([]byte, 1<<18)
				}
				if _, err := c.Write(big); err != nil {
					return
				}
			}
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
	})
}
