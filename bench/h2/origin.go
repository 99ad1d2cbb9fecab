package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/bench/rig"
)

// serveOrigin is the application behind all pairs: it answers /v1/KIB with so
// many KiB, and a call of gRPC with a message of as many bytes as came.
func serveOrigin(address string) error {
	return rig.Serve(address, func(c net.Conn) { fmt.Fprintln(os.Stderr, "origin:", originConn(c)) })
}

// An origin answers on one connection.
type origin struct {
	*wire
	asked   map[uint32]*answer // whose request has not ended, or whose answer has not
	ready   []uint32           // answers that wait for the connection's window
	answers map[string]*kind
	epoch   int // of the table
}

// A kind is a sort of answer.
type kind struct {
	head, trailer   []hpack.HeaderField
	body            []byte
	heads, trailers cached
}

// A cached block is valid as long as no other has changed the table.
type cached struct {
	block []byte
	epoch int
	known bool
}

// An answer is on its way.
type answer struct {
	k      *kind
	left   []byte
	window int
	begun  bool
	whole  bool // the request has ended
	waits  bool
}

func kinds() map[string]*kind {
	out := map[string]*kind{}
	for _, kib := range []int{1, 64} {
		body := bytes.Repeat([]byte{'x'}, kib<<10)
		out[fmt.Sprintf("/v1/%d", kib)] = &kind{body: body, head: []hpack.HeaderField{
			{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/json"}, {Name: "content-length", Value: strconv.Itoa(len(body))},
		}}
	}
	out[method] = &kind{body: message(1 << 10), trailer: []hpack.HeaderField{{Name: "grpc-status", Value: "0"}, {Name: "grpc-message", Value: ""}},
		head: []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}}
	return out
}

// message is a message of gRPC with so many bytes, with its five bytes in front.
func message(n int) []byte {
	return append([]byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, bytes.Repeat([]byte{'x'}, n)...)
}

func originConn(c net.Conn) error {
	o := &origin{wire: newWire(c), asked: map[uint32]*answer{}, answers: kinds()}
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c, preface); err != nil {
		return err
	}
	if string(preface) != http2.ClientPreface {
		return fmt.Errorf("began with %q", preface)
	}
	o.hello()
	if err := o.flush(); err != nil {
		return err
	}
	return o.serve(o, func(f func() error) error { return f() })
}

func (o *origin) opens(id uint32, last bool) error {
	k := o.answers[o.path]
	if k == nil {
		return fmt.Errorf("asked for %q", o.path)
	}
	o.asked[id] = &answer{k: k, left: k.body, window: o.firstStream}
	if last {
		return o.ends(id)
	}
	return nil
}

func (o *origin) takes(id uint32, n int, last bool) error {
	if last {
		return o.ends(id)
	}
	return nil
}

func (o *origin) ends(id uint32) error {
	a := o.asked[id]
	if a == nil {
		return nil // broken off
	}
	a.whole = true
	o.answer(id, a)
	return nil
}

// once gives the block of fields: the first of a connection fills the table.
func (o *origin) once(c *cached, fields []hpack.HeaderField) []byte {
	switch {
	case !c.known:
		c.known = true
		o.epoch++
		return o.block(fields)
	case c.block == nil || c.epoch != o.epoch:
		c.block, c.epoch = o.block(fields), o.epoch
	}
	return c.block
}

// answer sends what the windows let it.
func (o *origin) answer(id uint32, a *answer) {
	if !a.begun {
		a.begun = true
		b := o.once(&a.k.heads, a.k.head)
		o.frame(len(b), http2.FrameHeaders, http2.FlagHeadersEndHeaders, id)
		o.out = append(o.out, b...)
	}
	for len(a.left) > 0 {
		n := min(len(a.left), maxFrame, a.window, o.window)
		if n <= 0 {
			if a.window > 0 && !a.waits {
				a.waits = true
				o.ready = append(o.ready, id)
			}
			return
		}
		var flags http2.Flags
		if n == len(a.left) && a.k.trailer == nil {
			flags = http2.FlagDataEndStream
		}
		o.frame(n, http2.FrameData, flags, id)
		o.out = append(o.out, a.left[:n]...)
		a.left, a.window, o.window = a.left[n:], a.window-n, o.window-n
	}
	if a.k.trailer != nil {
		b := o.once(&a.k.trailers, a.k.trailer)
		o.frame(len(b), http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, id)
		o.out = append(o.out, b...)
	}
	delete(o.asked, id)
}

func (o *origin) moved(id uint32, n int) error {
	switch id {
	case everyStream:
		for id, a := range o.asked {
			if a.window += n; a.whole && !a.waits {
				o.answer(id, a)
			}
		}
	case 0:
		ready := o.ready
		o.ready = nil
		for _, id := range ready {
			if a := o.asked[id]; a != nil {
				a.waits = false
				o.answer(id, a)
			}
		}
	default:
		if a := o.asked[id]; a != nil {
			if a.window += n; a.whole && !a.waits {
				o.answer(id, a)
			}
		}
	}
	return nil
}

func (o *origin) broken(id uint32, _ http2.ErrCode) error {
	delete(o.asked, id)
	return nil
}
