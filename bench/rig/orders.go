package rig

import (
	"encoding/json"
	"fmt"
	"net"
)

// ServeOrders is a load process: it takes orders on a Unix socket and carries
// each out. An order is one line of JSON, answered by "warm", when carry says
// so, and by the report.
func ServeOrders[O, R any](socket string, carry func(o O, warm func()) R) error {
	return serveOn("unix", socket, func(c net.Conn) {
		in, out := json.NewDecoder(c), json.NewEncoder(c)
		for {
			var o O
			if in.Decode(&o) != nil {
				return
			}
			r := carry(o, func() { _ = out.Encode("warm") })
			if out.Encode(r) != nil {
				return
			}
		}
	})
}

// A Loader is a load process, asked from here.
type Loader[O, R any] struct {
	in  *json.Decoder
	out *json.Encoder
}

// DialLoader connects to the load process behind a socket.
func DialLoader[O, R any](socket string) (*Loader[O, R], error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	return &Loader[O, R]{in: json.NewDecoder(c), out: json.NewEncoder(c)}, nil
}

// Do has an order carried out; at warm the measured time begins.
func (l *Loader[O, R]) Do(o O, warm func()) (r R, err error) {
	var word string
	if err := l.out.Encode(o); err != nil {
		return r, err
	}
	if err := l.in.Decode(&word); err != nil {
		return r, fmt.Errorf("load process: %w", err)
	}
	warm()
	return r, l.in.Decode(&r)
}
