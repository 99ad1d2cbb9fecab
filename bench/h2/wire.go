package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	headerLen   = 9
	ownWindow   = 1 << 20 // of each stream, for what comes
	connWindow  = 1 << 30 // of the connection
	maxFrame    = 16 << 10
	firstWindow = 65535
)

// A wire is one HTTP/2 connection with prior knowledge, of either end. It is
// made to cost little, and trusts its peer as far as a bench may.
type wire struct {
	c   net.Conn
	out []byte
	dec *hpack.Decoder

	// status and grpc are of the head that was decoded last, path too.
	status, grpc, path string
	eaten              int // of the connection's window

	window      int // of the connection, for what goes
	firstStream int // the window of a new stream
	most        int // streams at once that the peer takes
	settled     bool

	enc  *hpack.Encoder
	text bytes.Buffer
}

func newWire(c net.Conn) *wire {
	w := &wire{c: c, window: firstWindow, firstStream: firstWindow, most: 100}
	w.dec = hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		switch f.Name {
		case ":status":
			w.status = f.Value
		case ":path":
			w.path = f.Value
		case "grpc-status":
			w.grpc = f.Value
		}
	})
	w.enc = hpack.NewEncoder(&w.text)
	return w
}

func (w *wire) frame(n int, t http2.FrameType, flags http2.Flags, id uint32) {
	w.out = append(w.out, byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags))
	w.out = binary.BigEndian.AppendUint32(w.out, id)
}

// hello says what this end takes.
func (w *wire) hello() {
	w.frame(12, http2.FrameSettings, 0, 0)
	w.setting(http2.SettingInitialWindowSize, ownWindow)
	w.setting(http2.SettingMaxConcurrentStreams, 1000)
	w.grant(0, connWindow-firstWindow)
}

func (w *wire) setting(id http2.SettingID, v uint32) {
	w.out = binary.BigEndian.AppendUint16(w.out, uint16(id))
	w.out = binary.BigEndian.AppendUint32(w.out, v)
}

func (w *wire) grant(id uint32, n int) {
	w.frame(4, http2.FrameWindowUpdate, 0, id)
	w.out = binary.BigEndian.AppendUint32(w.out, uint32(n))
}

// block encodes fields; with the same fields all blocks but the first are equal.
func (w *wire) block(fields []hpack.HeaderField) []byte {
	w.text.Reset()
	for _, f := range fields {
		_ = w.enc.WriteField(f) // into memory
	}
	return bytes.Clone(w.text.Bytes())
}

func (w *wire) flush() error {
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.c.Write(w.out)
	w.out = w.out[:0]
	return err
}

// An end is what differs between the client and the origin.
type end interface {
	// opens is told of a head, in status, grpc and path of the wire.
	opens(id uint32, last bool) error
	takes(id uint32, n int, last bool) error
	// moved says that a window has grown: of the stream, or of the connection
	// when id is 0.
	moved(id uint32, n int) error
	broken(id uint32, code http2.ErrCode) error
}

// take reads the frames in b and returns how many bytes they had.
func (w *wire) take(b []byte, e end) (n int, err error) {
	for err == nil && len(b)-n >= headerLen {
		h := b[n : n+headerLen]
		size := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		if size > maxFrame {
			return n, errors.New("a frame is too large")
		}
		if len(b)-n-headerLen < size {
			break
		}
		p := b[n+headerLen : n+headerLen+size]
		n += headerLen + size
		err = w.one(http2.FrameType(h[3]), http2.Flags(h[4]), binary.BigEndian.Uint32(h[5:])&(1<<31-1), p, e)
	}
	return n, err
}

func (w *wire) one(t http2.FrameType, flags http2.Flags, id uint32, p []byte, e end) error {
	switch t {
	case http2.FrameHeaders:
		if !flags.Has(http2.FlagHeadersEndHeaders) {
			return errors.New("a head of several frames")
		}
		if flags.Has(http2.FlagHeadersPadded) {
			p = p[1 : len(p)-int(p[0])]
		}
		if flags.Has(http2.FlagHeadersPriority) {
			p = p[5:]
		}
		if _, err := w.dec.Write(p); err != nil {
			return err
		}
		if err := w.dec.Close(); err != nil {
			return err
		}
		return e.opens(id, flags.Has(http2.FlagHeadersEndStream))
	case http2.FrameData:
		if w.eaten += len(p); w.eaten > connWindow/2 {
			w.grant(0, w.eaten)
			w.eaten = 0
		}
		if flags.Has(http2.FlagDataPadded) {
			p = p[1 : len(p)-int(p[0])]
		}
		return e.takes(id, len(p), flags.Has(http2.FlagDataEndStream))
	case http2.FrameSettings:
		return w.settings(flags, p, e)
	case http2.FrameWindowUpdate:
		n := int(binary.BigEndian.Uint32(p))
		if id == 0 {
			w.window += n
		}
		return e.moved(id, n)
	case http2.FramePing:
		if !flags.Has(http2.FlagPingAck) {
			w.frame(len(p), http2.FramePing, http2.FlagPingAck, 0)
			w.out = append(w.out, p...)
		}
	case http2.FrameRSTStream:
		return e.broken(id, http2.ErrCode(binary.BigEndian.Uint32(p)))
	case http2.FrameGoAway:
		return fmt.Errorf("the peer is going away: %v %q", http2.ErrCode(binary.BigEndian.Uint32(p[4:])), p[8:])
	}
	return nil
}

func (w *wire) settings(flags http2.Flags, p []byte, e end) error {
	if flags.Has(http2.FlagSettingsAck) {
		return nil
	}
	grown := 0
	for ; len(p) >= 6; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch http2.SettingID(binary.BigEndian.Uint16(p)) {
		case http2.SettingHeaderTableSize:
			w.enc.SetMaxDynamicTableSizeLimit(v)
		case http2.SettingMaxConcurrentStreams:
			w.most = int(v)
		case http2.SettingInitialWindowSize:
			grown += int(v) - w.firstStream
			w.firstStream = int(v)
		}
	}
	w.settled = true
	w.frame(0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	if grown != 0 {
		return e.moved(everyStream, grown)
	}
	return nil
}

// everyStream is the id for which a change of the first window is told.
const everyStream = 1 << 31

// serve reads frames and writes what they have queued, until the end; locked
// runs each such step.
func (w *wire) serve(e end, locked func(func() error) error) error {
	buf, r, n := make([]byte, 64<<10), 0, 0
	for {
		got, err := w.c.Read(buf[n:])
		if err != nil {
			return err
		}
		n += got
		if err := locked(func() error {
			k, err := w.take(buf[r:n], e)
			if r += k; err != nil {
				return err
			}
			return w.flush()
		}); err != nil {
			return err
		}
		if r == n {
			r, n = 0, 0
		} else if len(buf)-n < maxFrame+headerLen {
			n = copy(buf, buf[r:n])
			r = 0
		}
	}
}
