package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

// MaxHello is the most that ReadHello reads, record headers included. A
// ClientHello with post-quantum key shares has about 1.8 kB.
const MaxHello = 64 << 10

// A Hello is what a TLS ClientHello says in the clear.
type Hello struct {
	// Raw is every byte read, to be replayed to the server.
	Raw []byte
	// ServerName is the SNI as sent; empty when there is none.
	ServerName string
	// ALPN is the list of application protocols, as sent.
	ALPN []string
	// ECH says that the hello carries Encrypted ClientHello (RFC 9849), real or
	// GREASE: then ServerName may not be the name meant. ESNI says the same of its
	// drafts.
	ECH, ESNI bool
	// EarlyData says that 0-RTT data may follow.
	EarlyData bool
}

const (
	recordHandshake = 22
	helloClient     = 1
	helloServer     = 2

	extServerName    = 0
	extALPN          = 16
	extEarlyData     = 42
	extECHOuter      = 0xfd00
	extECH           = 0xfe0d
	extEncryptedName = 0xffce
)

// ReadHello reads one ClientHello (RFC 8446, 4.1.2) from r, over as many
// records and reads as it takes, and no byte more. The error is a *Refusal, or
// the error of r when r fails before the hello is whole. The caller bounds the
// time. On every error the bytes read are in Hello.Raw.
func ReadHello(r io.Reader) (Hello, error) { return continueHello(r, nil) }

// continueHello is ReadHello when the bytes in raw were already read from r.
func continueHello(r io.Reader, raw []byte) (Hello, error) {
	rd := &recordReader{r: r, raw: raw}
	msg, err := rd.message()
	if err != nil {
		return Hello{Raw: rd.raw}, err
	}
	h := Hello{Raw: rd.raw}
	if msg[0] != helloClient {
		return h, refuse(ReasonHello, "the first TLS message has type %d, not ClientHello", msg[0])
	}
	if err := h.parse(msg[4:]); err != nil {
		return h, err
	}
	return h, nil
}

// A recordReader collects one handshake message from plaintext records.
type recordReader struct {
	r   io.Reader
	raw []byte // all that was read
	pos int    // start of the next record in raw
}

// need makes raw hold n bytes after pos.
func (rd *recordReader) need(n int) error {
	end := rd.pos + n
	if end <= len(rd.raw) {
		return nil
	}
	if end > MaxHello {
		return refuse(ReasonHello, "the ClientHello has more than %d bytes", MaxHello)
	}
	have := len(rd.raw)
	rd.raw = append(rd.raw, make([]byte, end-have)...)
	k, err := io.ReadFull(rd.r, rd.raw[have:])
	rd.raw = rd.raw[:have+k]
	return err
}

// message returns one whole handshake message, header of four bytes included.
func (rd *recordReader) message() ([]byte, error) {
	var msg []byte
	for first := true; ; first = false {
		if err := rd.need(1); err != nil {
			return nil, err
		}
		if rd.raw[rd.pos] != recordHandshake {
			if first {
				return nil, refuse(ReasonNotTLS, "the first byte is 0x%02x, not a TLS handshake record", rd.raw[rd.pos])
			}
			return nil, refuse(ReasonHello, "a record of type %d stands inside the ClientHello", rd.raw[rd.pos])
		}
		if err := rd.need(5); err != nil {
			return nil, err
		}
		head := rd.raw[rd.pos : rd.pos+5]
		n := int(binary.BigEndian.Uint16(head[3:]))
		if head[1] != 3 || head[2] > 4 {
			return nil, refuse(ReasonNotTLS, "the first record has version %d.%d, not TLS", head[1], head[2])
		}
		if n == 0 || n > 16<<10 {
			return nil, refuse(ReasonHello, "a handshake record has %d bytes; 1 to 16384 are accepted", n)
		}
		if err := rd.need(5 + n); err != nil {
			return nil, err
		}
		msg = append(msg, rd.raw[rd.pos+5:rd.pos+5+n]...)
		rd.pos += 5 + n
		if len(msg) < 4 {
			continue
		}
		size := 4 + (int(msg[1])<<16 | int(msg[2])<<8 | int(msg[3]))
		switch {
		case size > MaxHello:
			return nil, refuse(ReasonHello, "the ClientHello has %d bytes; %d is the limit", size, MaxHello)
		case len(msg) == size:
			return msg, nil
		case len(msg) > size:
			return nil, refuse(ReasonHello, "bytes follow the ClientHello in its record")
		}
	}
}

// fields reads length-prefixed fields. After a short read, bad stays true.
type fields struct {
	b   []byte
	bad bool
}

func (f *fields) take(n int) []byte {
	if f.bad || n > len(f.b) {
		f.bad = true
		return nil
	}
	v := f.b[:n]
	f.b = f.b[n:]
	return v
}

func (f *fields) u8() int {
	if v := f.take(1); v != nil {
		return int(v[0])
	}
	return 0
}

func (f *fields) u16() int {
	if v := f.take(2); v != nil {
		return int(binary.BigEndian.Uint16(v))
	}
	return 0
}

var errMalformed = errors.New("malformed")

// parse reads the body of a ClientHello.
func (h *Hello) parse(body []byte) error {
	f := &fields{b: body}
	f.take(2 + 32) // legacy_version, random
	session := f.take(f.u8())
	suites := f.take(f.u16())
	compression := f.take(f.u8())
	if f.bad || len(session) > 32 || len(suites) < 2 || len(suites)%2 != 0 || len(compression) == 0 {
		return refuse(ReasonHello, "the ClientHello is malformed before its extensions")
	}
	if len(f.b) == 0 {
		return nil
	}
	ext := &fields{b: f.take(f.u16())}
	if f.bad || len(f.b) != 0 {
		return refuse(ReasonHello, "the extensions do not fill the ClientHello")
	}
	seen := make(map[int]bool)
	for len(ext.b) > 0 {
		typ := ext.u16()
		data := ext.take(ext.u16())
		if ext.bad {
			return refuse(ReasonHello, "the list of extensions is cut off")
		}
		if seen[typ] {
			return refuse(ReasonHello, "extension %d stands twice", typ)
		}
		seen[typ] = true
		if err := h.extension(typ, data); err != nil {
			return refuse(ReasonHello, "extension %d: %v", typ, err)
		}
	}
	return nil
}

func (h *Hello) extension(typ int, data []byte) error {
	switch typ {
	case extServerName:
		name, err := serverName(data)
		h.ServerName = name
		return err
	case extALPN:
		list, err := protocols(data)
		h.ALPN = list
		return err
	case extEarlyData:
		h.EarlyData = true
	case extECH:
		h.ECH = true
	case extECHOuter, extEncryptedName:
		h.ESNI = true
	}
	return nil
}

// serverName reads server_name (RFC 6066, 3): a list of exactly one host name.
func serverName(data []byte) (string, error) {
	f := &fields{b: data}
	list := &fields{b: f.take(f.u16())}
	if f.bad || len(f.b) != 0 {
		return "", errMalformed
	}
	typ := list.u8()
	name := list.take(list.u16())
	if list.bad {
		return "", errMalformed
	}
	if typ != 0 {
		return "", fmt.Errorf("name type %d is not host_name", typ)
	}
	if len(list.b) != 0 {
		return "", errors.New("more than one name")
	}
	if len(name) == 0 {
		return "", errors.New("the name is empty")
	}
	return string(name), nil
}

// protocols reads ALPN (RFC 7301, 3.1).
func protocols(data []byte) ([]string, error) {
	f := &fields{b: data}
	list := &fields{b: f.take(f.u16())}
	if f.bad || len(f.b) != 0 || len(list.b) == 0 {
		return nil, errMalformed
	}
	var out []string
	for len(list.b) > 0 {
		p := list.take(list.u8())
		if list.bad || len(p) == 0 {
			return nil, errMalformed
		}
		out = append(out, string(p))
	}
	return out, nil
}

// checkALPN says whether h offers nothing but protocols in list; an empty list
// allows any, and who offers none at all may go on.
func (h *Hello) checkALPN(list []string) error {
	if len(list) == 0 {
		return nil
	}
	for _, p := range h.ALPN {
		if !slices.Contains(list, p) {
			return refuse(ReasonALPN, "the ClientHello offers %s; allowed are %s", clip(p), strings.Join(list, ", "))
		}
	}
	return nil
}

// Check holds h against the name that was allowed and what its destination says of
// hellos. The error is a *Refusal.
func (h *Hello) Check(want Host, how *mesh.Destination) error {
	if h.ESNI || h.ECH && (how.ECH != mesh.AllowGREASE || h.ServerName == "") {
		return refuse(ReasonECH, "the ClientHello carries an encrypted name (ECH or ESNI)")
	}
	if err := h.checkServerName(want, how.SNI == sniOptional); err != nil {
		return err
	}
	list := how.ALPN
	if len(list) > 0 && how.TLS != "" { // what callers speak with the gateway, whatever the host does
		list = append(slices.Clip(list), mesh.ALPNHTTP1)
	}
	return h.checkALPN(list)
}

// checkServerName compares the SNI of h with the name that was allowed. With
// optional, a hello without SNI passes. RFC 6066 allows no trailing dot and no
// address in SNI, so neither passes.
func (h *Hello) checkServerName(want Host, optional bool) error {
	if h.ServerName == "" {
		if optional {
			return nil
		}
		return refuse(ReasonNoSNI, "the ClientHello names no server; %s was allowed", want)
	}
	name, err := ParseName(h.ServerName)
	if err != nil {
		return refuse(ReasonSNI, "the server name is not acceptable: %v", err)
	}
	if h.ServerName[len(h.ServerName)-1] == '.' {
		return refuse(ReasonSNI, "the server name %s ends in a dot", clip(h.ServerName))
	}
	if _, literal := want.Addr(); literal || name != want.name {
		return refuse(ReasonSNI, "the server name is %s; %s was allowed", clip(name), want)
	}
	return nil
}
