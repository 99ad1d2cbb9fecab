package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/hop"
)

// A hostile order is an attack at a door.
type hostile struct {
	Door   string        `json:"door"`
	Kind   string        `json:"kind"`
	Target string        `json:"target"`
	SVID   string        `json:"svid"`
	Roots  string        `json:"roots"`
	Conns  int           `json:"conns"`
	For    time.Duration `json:"for"` // once all connections stand
}

// A toll is what an attack did.
type toll struct {
	Conns   int64   `json:"conns"`
	Resets  int64   `json:"resets"`
	Cut     int64   `json:"cut"` // connections that the other end has ended
	Fault   string  `json:"fault,omitempty"`
	Seconds float64 `json:"seconds"`
}

// An attack is one under way.
type attack struct {
	hostile
	tls                *tls.Config
	ctx                context.Context
	conns, resets, cut atomic.Int64
}

// makers is how many connections are begun at a time.
const makers = 16

func (o hostile) run(warm func()) (t toll) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a := &attack{hostile: o, ctx: ctx}
	if err := a.arm(); err != nil {
		warm()
		return toll{Fault: err.Error()}
	}
	var standing, all sync.WaitGroup
	turns := make(chan struct{}, makers)
	var fault atomic.Pointer[error]
	for range o.Conns {
		turns <- struct{}{}
		standing.Add(1)
		all.Go(func() {
			done := sync.OnceFunc(func() { standing.Done(); <-turns })
			defer done()
			if err := a.drive(done); err != nil {
				fault.CompareAndSwap(nil, &err)
			}
		})
	}
	standing.Wait()
	from := time.Now()
	conns, resets, cut := a.conns.Load(), a.resets.Load(), a.cut.Load()
	warm()
	time.Sleep(o.For)
	t = toll{Conns: a.conns.Load() - conns, Resets: a.resets.Load() - resets, Cut: a.cut.Load() - cut, Seconds: time.Since(from).Seconds()}
	cancel()
	all.Wait()
	if err := fault.Load(); err != nil {
		t.Fault = (*err).Error()
	}
	return t
}

// arm readies what all connections have in common.
func (a *attack) arm() error {
	if a.Door == doorOut {
		return nil
	}
	cert, err := tls.LoadX509KeyPair(a.SVID, a.SVID)
	if err != nil {
		return err
	}
	// Whom it attacks is no question of this bench. X25519 alone costs it less.
	a.tls = &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, CurvePreferences: []tls.CurveID{tls.X25519}}
	switch a.Kind {
	case kindRapid:
		a.tls.NextProtos = []string{"h2"}
	case kindHopReset:
		a.tls.NextProtos = []string{hop.Proto}
	default:
		a.tls.NextProtos = []string{"http/1.1"}
	}
	return nil
}

// dial makes a connection, which ends with the attack.
func (a *attack) dial() (net.Conn, *net.TCPConn, error) {
	d := new(net.Dialer)
	if a.Door != doorOut { // there it comes from another machine
		d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}
	}
	raw, err := d.DialContext(a.ctx, "tcp", a.Target)
	if err != nil {
		return nil, nil, err
	}
	t := raw.(*net.TCPConn)
	a.conns.Add(1)
	context.AfterFunc(a.ctx, func() { _ = t.SetLinger(0); t.Close() })
	if a.tls == nil {
		return raw, t, nil
	}
	c := tls.Client(raw, a.tls)
	return c, t, c.HandshakeContext(a.ctx)
}

// drive keeps one connection hostile, a new one when it was cut off, until the
// attack ends. stands is called when the first does what it should.
func (a *attack) drive(stands func()) error {
	kinds := map[string]func(func()) error{
		kindIdle: a.idle, kindLoris: a.loris, kindDeaf: a.deaf, kindResets: a.reset, kindRapid: a.rapid, kindHopReset: a.hopReset,
	}
	first, patience := true, 40
	for a.ctx.Err() == nil {
		err := kinds[a.Kind](func() { first = false; stands() })
		if a.ctx.Err() != nil {
			return nil
		}
		if first { // the door may still be shut because of the attack before
			if patience--; patience < 0 {
				return fmt.Errorf("the first connection: %w", err)
			}
			time.Sleep(50 * time.Millisecond)
			continue
		}
		if err != nil {
			a.cut.Add(1)
			time.Sleep(time.Millisecond) // a door that is shut costs nobody anything
		}
	}
	return nil
}

// head is a request as the door takes it.
func (a *attack) head(path string) string {
	switch a.Door {
	case doorOut:
		return fmt.Sprintf("GET http://%s%s HTTP/1.1\r\nHost: %s\r\n\r\n", origin, path, origin)
	case doorIn:
		return fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, origin)
	}
	return fmt.Sprintf("CONNECT %s:443 HTTP/1.1\r\nHost: %s:443\r\n\r\n", outside, outside)
}

// idle says nothing.
func (a *attack) idle(stands func()) error {
	c, _, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	stands()
	_, err = c.Read(make([]byte, 1))
	return err
}

// loris says a head byte by byte, and never its end.
func (a *attack) loris(stands func()) error {
	c, _, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	ended := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	}()
	pace := time.NewTicker(time.Second / 2)
	defer pace.Stop()
	head := a.head(small)
	for i := 0; ; i++ {
		if _, err := io.WriteString(c, head[i%(len(head)/2):][:1]); err != nil {
			return err
		}
		stands()
		select {
		case err := <-ended:
			return err
		case <-pace.C:
		}
	}
}

// deaf asks for much and reads none of it.
func (a *attack) deaf(stands func()) error {
	c, t, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	_ = t.SetReadBuffer(4 << 10)
	if a.Door == doorGateway {
		if c, err = tunnel(c, a.Roots); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", much, outside)
	} else {
		_, err = io.WriteString(c, a.head(much))
	}
	if err != nil {
		return err
	}
	stands()
	<-a.ctx.Done()
	return nil
}

// reset asks and resets the connection.
func (a *attack) reset(stands func()) error {
	c, t, err := a.dial()
	if err != nil {
		return err
	}
	stands()
	_, err = io.WriteString(c, a.head(small))
	_ = t.SetLinger(0)
	t.Close()
	a.resets.Add(1)
	return err
}

// batch is how many streams are opened and reset by one write.
const batch = 100

// rapid opens streams of HTTP/2 and resets each at once.
func (a *attack) rapid(stands func()) error {
	c, _, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	out := []byte(http2.ClientPreface)
	frame := func(n int, t http2.FrameType, flags http2.Flags, id uint32) {
		out = append(out, byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags))
		out = binary.BigEndian.AppendUint32(out, id)
	}
	frame(0, http2.FrameSettings, 0, 0)
	block := a.block()
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, c)
		if err == nil {
			err = io.EOF
		}
		ended <- err
	}()
	for id := uint32(1); ; {
		for range batch {
			frame(len(block), http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, id)
			out = append(out, block...)
			frame(4, http2.FrameRSTStream, 0, id)
			out = binary.BigEndian.AppendUint32(out, uint32(http2.ErrCodeCancel))
			id += 2
		}
		if _, err := c.Write(out); err != nil {
			return err
		}
		out = out[:0]
		a.resets.Add(batch)
		stands()
		select {
		case err := <-ended:
			return err
		default:
		}
	}
}

// block is the field section of a request, which changes no table.
func (a *attack) block() []byte {
	fields := []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: origin}, {Name: ":path", Value: small}}
	if a.Door == doorGateway {
		fields = []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: outside + ":443"}}
	}
	var b writer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSizeLimit(0)
	for _, f := range fields {
		_ = e.WriteField(f) // into memory
	}
	return b
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) {
	*w = append(*w, p...)
	return len(p), nil
}

// hopReset opens streams of sallyport/1, asks on each, and resets it.
func (a *attack) hopReset(stands func()) error {
	c, _, err := a.dial()
	if err != nil {
		return err
	}
	h := hop.Dialled(c, hop.Config{})
	ended := make(chan error, 1)
	go func() { ended <- h.Run() }()
	defer func() { h.Close(); <-ended }()
	head := []byte(a.head(small))
	for {
		s, err := h.Open()
		if errors.Is(err, hop.ErrFull) {
			continue
		}
		if err != nil {
			return err
		}
		_, err = s.Write(head)
		_ = s.Close()
		if err != nil {
			return err
		}
		a.resets.Add(1)
		stands()
	}
}
