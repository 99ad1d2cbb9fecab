package nameserver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/capture"
)

const (
	// batch is how many datagrams are taken at once, and room what each may have:
	// the largest question that anybody has a use for.
	batch, room = 64, 1536
	// slow is how many questions may be looked at the slow way at once. What comes
	// beyond over UDP is dropped: its asker asks again.
	slow = 128
	// fewEntries are kept for what is asked now and then.
	fewEntries = 256
	// again is after how long a socket is read again that could not be.
	again = 20 * time.Millisecond
)

// ServeUDP answers the workload on a socket until ctx ends, and closes it.
func (n *Names) ServeUDP(ctx context.Context, c *net.UDPConn, who spiffeid.ID) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	d, err := capture.NewDatagrams(c, batch, room)
	if err != nil {
		return err
	}
	a := n.answerer(who, maxEntries)
	at := 0 // the datagram that is looked at
	a.from = func() netip.AddrPort { return d.From(at) }
	var aside sync.WaitGroup
	defer aside.Wait()
	times := n.cfg.Metrics.NameTimes(isReady)
	places := make(chan *answerer, slow)
	for range slow {
		places <- nil
	}
	for {
		came, err := d.Read()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			// Another process reads the socket for now, or the kernel is short of
			// something.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(again):
			}
			continue
		}
		began, answers := time.Now(), 0 // the datagrams of a batch share their time
		for i := range came {
			if !a.may() {
				continue
			}
			b, size := d.At(i)
			at = i
			if answer, e := a.quick(b, size); answer > 0 {
				e.count.Inc()
				answers++
				d.Reply(i, answer)
				if n.cfg.Tracer != nil {
					a.span(e, e.result, isReady, began, time.Now())
				}
				continue
			}
			select {
			case one := <-places:
				in, to := bytes.Clone(b[:size]), d.From(i)
				aside.Go(func() {
					if one == nil {
						one = n.answerer(who, fewEntries)
					}
					one.from = func() netip.AddrPort { return to }
					defer func() { places <- one }()
					if out, r := one.answer(ctx, in, false); len(out) > 0 {
						one.told(r, began)
						_, _ = c.WriteToUDPAddrPort(out, to) // may be lost
					}
				})
			default:
				n.counter(Dropped).Inc()
			}
		}
		err = d.Send()
		times.Observe(time.Since(began), answers)
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
}

const (
	// maxConns bounds the connections of one listener, handshakeTime how long it
	// may take one to say whose it is, idleTime how long it may have nothing to
	// ask, and writeTime how long an answer may take.
	maxConns      = 1024
	handshakeTime = 5 * time.Second
	idleTime      = 30 * time.Second
	writeTime     = 5 * time.Second
)

// A Peer says who is at the other end of a connection now.
type Peer func(context.Context) (spiffeid.ID, error)

// Serve answers over the connections of a stream listener until ctx ends, and
// closes it. Who is given each connection once, and what it returns is asked
// again for each question; nobody is answered whom that does not know.
func (n *Names) Serve(ctx context.Context, ln net.Listener, who func(net.Conn) Peer) error {
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var conns sync.WaitGroup
	defer conns.Wait()
	places := make(chan struct{}, maxConns)
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // too many files, as a rule
			n.cfg.Log.Warn("a connection was not accepted", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		select {
		case places <- struct{}{}:
			conns.Go(func() {
				defer func() { <-places }()
				n.serveConn(ctx, c, who(c))
			})
		default:
			n.counter(Dropped).Inc()
			c.Close()
		}
	}
}

// serveConn answers questions in their order (RFC 7766 allows any).
func (n *Names) serveConn(ctx context.Context, c net.Conn, who Peer) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var a *answerer
	buf := make([]byte, 2, 2+room)
	if c.SetDeadline(time.Now().Add(handshakeTime)) != nil {
		return
	}
	for {
		id, err := who(ctx)
		if err == nil {
			err = c.SetDeadline(time.Now().Add(idleTime))
		}
		if err != nil {
			return
		}
		if a == nil || a.who != id {
			a = n.answerer(id, fewEntries)
			a.at(c.RemoteAddr())
		}
		buf = buf[:2]
		if _, err := io.ReadFull(c, buf); err != nil {
			return
		}
		size := int(binary.BigEndian.Uint16(buf))
		if size < headSize || size > room {
			return // nothing that could be answered
		}
		buf = buf[:2+size]
		if _, err := io.ReadFull(c, buf[2:]); err != nil {
			return
		}
		if id, err = who(ctx); err != nil || id != a.who { // it may have waited long
			return
		}
		if !a.may() {
			return
		}
		began := time.Now()
		out, r := a.answer(ctx, buf[2:], true)
		if len(out) == 0 {
			return
		}
		a.told(r, began)
		out = append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(out)), uint16(len(out))), out...)
		if c.SetWriteDeadline(time.Now().Add(writeTime)) != nil {
			return
		}
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}
