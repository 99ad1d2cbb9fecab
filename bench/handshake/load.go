package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"sallyport/bench/rig"
)

// An order is what the load process is asked to do.
type order struct {
	Target  string        `json:"target"`
	SVID    string        `json:"svid"`   // the file with its certificates and key
	Groups  []tls.CurveID `json:"groups"` // offered for the key exchange; none: as crypto/tls does by itself
	Callers int           `json:"callers"`
	Warm    time.Duration `json:"warm"` // not counted
	For     time.Duration `json:"for"`
}

// within bounds one connection.
const within = 10 * time.Second

func (o order) run(warm func()) rig.Tally {
	cert, err := tls.LoadX509KeyPair(o.SVID, o.SVID)
	if err != nil {
		warm()
		return rig.Tally{Fault: err.Error()}
	}
	// Whom it reaches is no question of this bench, and to verify the chain
	// would cost what the servers need.
	conf := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, CurvePreferences: o.Groups}
	return rig.Count(o.Callers, o.Warm, o.For, warm, func(made *atomic.Int64, over *atomic.Bool) error {
		for !over.Load() {
			if err := once(o.Target, conf); err != nil {
				return err
			}
			made.Add(1)
		}
		return nil
	})
}

// once makes a connection, has a byte echoed and ends it in order.
func once(target string, conf *tls.Config) error {
	nc, err := net.Dial("tcp", target)
	if err != nil {
		return err
	}
	defer nc.Close()
	if err := nc.SetDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	c := tls.Client(nc, conf)
	b := []byte{'x'}
	if _, err := c.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if c.ConnectionState().DidResume {
		return errors.New("the session was resumed")
	}
	if b[0] != 'x' {
		return fmt.Errorf("the echo of 'x' was %q", b)
	}
	return c.Close()
}

// serveOrigin is the application: it sends back what comes.
func serveOrigin(address string) error {
	return rig.Serve(address, func(c net.Conn) {
		b := make([]byte, 64)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
	})
}
