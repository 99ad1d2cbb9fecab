package egress

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"sallyport/internal/mesh"
)

// captureConn keeps what is written and then fails.
type captureConn struct {
	net.Conn
	buf bytes.Buffer
}

func (c *captureConn) Write(p []byte) (int, error) { c.buf.Write(p); return 0, io.EOF }

// replayConn reads from r and swallows writes.
type replayConn struct {
	net.Conn
	r io.Reader
}

func (c *replayConn) Read(p []byte) (int, error)       { return c.r.Read(p) }
func (c *replayConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *replayConn) SetDeadline(time.Time) error      { return nil }
func (c *replayConn) SetWriteDeadline(time.Time) error { return nil }
func (c *replayConn) Close() error                     { return nil }

// realHello is the handshake message that crypto/tls sends for name.
func realHello(name string) []byte {
	c := &captureConn{}
	_ = tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}).Handshake()
	return c.buf.Bytes()[5:]
}

func extensionBytes(typ int, body []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(typ))
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

func sniBytes(names ...string) []byte {
	var list []byte
	for _, n := range names {
		list = append(list, 0)
		list = binary.BigEndian.AppendUint16(list, uint16(len(n)))
		list = append(list, n...)
	}
	return extensionBytes(extServerName, append(binary.BigEndian.AppendUint16(nil, uint16(len(list))), list...))
}

// rebuild replaces the server_name extension of msg by exts.
func rebuild(msg []byte, exts ...[]byte) []byte {
	p := 4 + 2 + 32
	p += 1 + int(msg[p])
	p += 2 + int(binary.BigEndian.Uint16(msg[p:]))
	p += 1 + int(msg[p])
	head, old := msg[4:p], msg[p+2:]
	out := bytes.Join(exts, nil)
	for len(old) > 0 {
		n := 4 + int(binary.BigEndian.Uint16(old[2:]))
		if binary.BigEndian.Uint16(old) != extServerName {
			out = append(out, old[:n]...)
		}
		old = old[n:]
	}
	body := append(bytes.Clone(head), binary.BigEndian.AppendUint16(nil, uint16(len(out)))...)
	return message(append(body, out...))
}

func message(body []byte) []byte {
	return append([]byte{helloClient, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// records cuts a message into TLS records of at most n bytes.
func records(msg []byte, n int) []byte {
	var out []byte
	for len(msg) > 0 {
		k := min(n, len(msg))
		out = append(out, recordHandshake, 3, 1)
		out = binary.BigEndian.AppendUint16(out, uint16(k))
		out = append(out, msg[:k]...)
		msg = msg[k:]
	}
	return out
}

func TestReadHello(t *testing.T) {
	base := realHello("allowed.example.com")
	pad := func(n int) []byte { return extensionBytes(0xfafa, make([]byte, n)) }
	tests := []struct {
		name string
		raw  []byte
		want Reason // of ReadHello, then of Check for allowed.example.com
	}{
		{"a plain hello", records(base, 16000), ""},
		{"in records of 40 bytes", records(base, 40), ""},
		{"in records of 1 byte", records(base, 1), ""},
		{"row 13: of 60 kB", records(rebuild(base, sniBytes("allowed.example.com"), pad(60000)), 16000), ""},
		{"row 13: over 64 KiB", records(rebuild(base, sniBytes("allowed.example.com"), pad(33000), extensionBytes(0xfafb, make([]byte, 32000))), 16000), ReasonHello},
		{"row 13: a length over 64 KiB", records([]byte{1, 1, 0, 0, 3, 3}, 100), ReasonHello},
		{"row 1: another name", records(rebuild(base, sniBytes("evil.example.net")), 16000), ReasonSNI},
		{"row 15: upper case", records(rebuild(base, sniBytes("ALLOWED.example.com")), 16000), ""},
		{"row 15: trailing dot", records(rebuild(base, sniBytes("allowed.example.com.")), 16000), ReasonSNI},
		{"row 15: NUL", records(rebuild(base, sniBytes("allowed.example.com\x00.evil.net")), 16000), ReasonSNI},
		{"row 15: Cyrillic", records(rebuild(base, sniBytes("аllowed.example.com")), 16000), ReasonSNI},
		{"row 15: star", records(rebuild(base, sniBytes("*.example.com")), 16000), ReasonSNI},
		{"row 15: leading dot", records(rebuild(base, sniBytes(".example.com")), 16000), ReasonSNI},
		{"row 15: empty name", records(rebuild(base, sniBytes("")), 16000), ReasonHello},
		{"row 15: A-label of another name", records(rebuild(base, sniBytes("xn--llowed-2nf.example.com")), 16000), ReasonSNI},
		{"a suffix of the name", records(rebuild(base, sniBytes("example.com")), 16000), ReasonSNI},
		{"a name below it", records(rebuild(base, sniBytes("x.allowed.example.com")), 16000), ReasonSNI},
		{"row 7: an IPv4 address", records(rebuild(base, sniBytes("203.0.113.7")), 16000), ReasonSNI},
		{"row 7: an IPv6 address", records(rebuild(base, sniBytes("::1")), 16000), ReasonSNI},
		{"row 6: no name", records(rebuild(base), 16000), ReasonNoSNI},
		{"two names in one list", records(rebuild(base, sniBytes("allowed.example.com", "evil.example.net")), 16000), ReasonHello},
		{"two SNI extensions", records(rebuild(base, sniBytes("allowed.example.com"), sniBytes("allowed.example.com")), 16000), ReasonHello},
		{"a name of another type", records(rebuild(base, extensionBytes(0, []byte{0, 4, 1, 0, 1, 'a'})), 16000), ReasonHello},
		{"an empty list", records(rebuild(base, extensionBytes(0, []byte{0, 0})), 16000), ReasonHello},
		{"an empty extension", records(rebuild(base, extensionBytes(0, nil)), 16000), ReasonHello},
		{"a list that is longer than it says", records(rebuild(base, extensionBytes(0, []byte{0, 4, 0, 0, 1, 'a', 'b'})), 16000), ReasonHello},
		{"row 8: ECH", records(rebuild(base, sniBytes("allowed.example.com"), extensionBytes(extECH, []byte{0, 0, 1, 0, 1})), 16000), ReasonECH},
		{"row 8: ECH, empty", records(rebuild(base, sniBytes("allowed.example.com"), extensionBytes(extECH, nil)), 16000), ReasonECH},
		{"row 8: outer extensions of ECH", records(rebuild(base, sniBytes("allowed.example.com"), extensionBytes(extECHOuter, nil)), 16000), ReasonECH},
		{"row 10: ESNI", records(rebuild(base, sniBytes("allowed.example.com"), extensionBytes(extEncryptedName, []byte{1})), 16000), ReasonECH},
		{"row 10: ESNI without SNI", records(rebuild(base, extensionBytes(extEncryptedName, []byte{1})), 16000), ReasonECH},
		{"row 18: plain HTTP", []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), ReasonNotTLS},
		{"row 18: SSH", []byte("SSH-2.0-x\r\n"), ReasonNotTLS},
		{"row 18: one byte that is not TLS", []byte{0}, ReasonNotTLS},
		{"SSLv2", []byte{0x80, 0x2e, 1, 0, 2, 0, 0x15}, ReasonNotTLS},
		{"a handshake byte that is not TLS", []byte{22, 'S', 'S', 'H', '\n'}, ReasonNotTLS},
		{"an alert first", append([]byte{21, 3, 1, 0, 2, 1, 0}, records(base, 16000)...), ReasonNotTLS},
		{"a change of cipher first", append([]byte{20, 3, 1, 0, 1, 1}, records(base, 16000)...), ReasonNotTLS},
		{"an empty record first", append([]byte{22, 3, 1, 0, 0}, records(base, 16000)...), ReasonHello},
		{"an alert inside", append(records(base[:40], 40), append([]byte{21, 3, 1, 0, 2, 1, 0}, records(base[40:], 16000)...)...), ReasonHello},
		{"a record over 16 KiB", append([]byte{22, 3, 1, 0x40, 1}, make([]byte, 0x4001)...), ReasonHello},
		{"a server's hello", records(append([]byte{2}, base[1:]...), 16000), ReasonHello},
		{"bytes after the hello", records(append(bytes.Clone(base), 1, 0, 0, 0), 16000), ReasonHello},
		{"a body that is cut off", records(message(base[4:60]), 16000), ReasonHello},
		{"bytes after the extensions", records(message(append(bytes.Clone(base[4:]), 0)), 16000), ReasonHello},
		{"an empty body", records(message(nil), 16000), ReasonHello},
	}
	want, err := ParseHost("allowed.example.com")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, r := range []io.Reader{bytes.NewReader(tt.raw), iotest.OneByteReader(bytes.NewReader(tt.raw))} {
				h, err := ReadHello(r)
				if err == nil {
					if !bytes.Equal(h.Raw, tt.raw) {
						t.Errorf("%d bytes kept of %d", len(h.Raw), len(tt.raw))
					}
					err = h.Check(want, &mesh.Destination{})
				}
				check(t, err, tt.want)
			}
		})
	}
}

func TestReadHelloLeavesWhatFollows(t *testing.T) {
	raw := records(realHello("allowed.example.com"), 16000)
	r := bytes.NewReader(append(bytes.Clone(raw), "early data"...))
	h, err := ReadHello(r)
	if err != nil || h.ServerName != "allowed.example.com" || strings.Join(h.ALPN, " ") != "h2 http/1.1" {
		t.Fatalf("got %q %q, %v", h.ServerName, h.ALPN, err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "early data" {
		t.Errorf("left %q", rest)
	}
}

func TestReadHelloCutOff(t *testing.T) {
	raw := records(realHello("allowed.example.com"), 100)
	for n := range raw {
		h, err := ReadHello(bytes.NewReader(raw[:n]))
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d of %d bytes: %v", n, len(raw), err)
		}
		if len(h.Raw) != n {
			t.Fatalf("%d of %d bytes: kept %d", n, len(raw), len(h.Raw))
		}
	}
}

func TestCheckOptional(t *testing.T) {
	want, _ := ParseHost("allowed.example.com")
	optional, grease := &mesh.Destination{SNI: sniOptional}, &mesh.Destination{SNI: sniOptional, ECH: mesh.AllowGREASE}
	check(t, (&Hello{}).Check(want, optional), "")
	check(t, (&Hello{ServerName: "evil.example.net"}).Check(want, optional), ReasonSNI)
	check(t, (&Hello{ECH: true}).Check(want, optional), ReasonECH)
	check(t, (&Hello{ECH: true}).Check(want, grease), ReasonECH) // nothing says whom it is for
	check(t, (&Hello{ECH: true, ServerName: want.String()}).Check(want, grease), "")
	check(t, (&Hello{ECH: true, ServerName: "evil.example.net"}).Check(want, grease), ReasonSNI)
	check(t, (&Hello{ESNI: true, ServerName: want.String()}).Check(want, grease), ReasonECH)
	literal, _ := ParseHost("192.0.2.1")
	check(t, (&Hello{ServerName: "192.0.2.1"}).Check(literal, optional), ReasonSNI)
}

// FuzzReadHello holds our reader against crypto/tls: when both read a hello,
// both read the same server name and protocols.
func FuzzReadHello(f *testing.F) {
	base := realHello("allowed.example.com")
	f.Add(records(base, 16000))
	f.Add(records(base, 40))
	f.Add(records(rebuild(base, sniBytes("a.b", "c.d")), 16000))
	f.Add(records(rebuild(base, extensionBytes(extECH, []byte{1})), 16000))
	f.Add(records(rebuild(base), 16000))
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := ReadHello(bytes.NewReader(raw))
		if len(h.Raw) > len(raw) || !bytes.HasPrefix(raw, h.Raw) || len(h.Raw) > MaxHello {
			t.Fatalf("kept bytes that were not sent")
		}
		if err != nil {
			return
		}
		var std *tls.ClientHelloInfo
		_ = tls.Server(&replayConn{r: bytes.NewReader(raw)}, &tls.Config{GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
			std = i
			return nil, errors.New("seen")
		}}).Handshake()
		if std == nil || h.ECH {
			return
		}
		if std.ServerName != h.ServerName || strings.Join(std.SupportedProtos, "\n") != strings.Join(h.ALPN, "\n") {
			t.Fatalf("we read %q %q, crypto/tls %q %q", h.ServerName, h.ALPN, std.ServerName, std.SupportedProtos)
		}
	})
}
