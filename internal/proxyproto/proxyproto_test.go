package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestRoundTrip(t *testing.T) {
	for _, tc := range []struct {
		name      string
		give, get Header
	}{
		{"IPv4", Header{Src: ap("192.0.2.1:5000"), Dst: ap("192.0.2.2:443")}, Header{Src: ap("192.0.2.1:5000"), Dst: ap("192.0.2.2:443")}},
		{"IPv6", Header{Src: ap("[2001:db8::1]:5000"), Dst: ap("[2001:db8::2]:443")}, Header{Src: ap("[2001:db8::1]:5000"), Dst: ap("[2001:db8::2]:443")}},
		{"mixed", Header{Src: ap("192.0.2.1:5000"), Dst: ap("[2001:db8::2]:443")}, Header{Src: ap("192.0.2.1:5000"), Dst: ap("[2001:db8::2]:443")}},
		{"mapped", Header{Src: ap("[::ffff:192.0.2.1]:1"), Dst: ap("192.0.2.2:2")}, Header{Src: ap("192.0.2.1:1"), Dst: ap("192.0.2.2:2")}},
		{"identity", Header{Src: ap("192.0.2.1:1"), Dst: ap("192.0.2.2:2"), SPIFFE: "spiffe://a.test/web"}, Header{Src: ap("192.0.2.1:1"), Dst: ap("192.0.2.2:2"), SPIFFE: "spiffe://a.test/web"}},
		{"no addresses", Header{SPIFFE: "spiffe://a.test/web"}, Header{SPIFFE: "spiffe://a.test/web"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := bytes.NewReader(append(tc.give.Append(nil), "rest"...))
			got, err := Read(iotest.OneByteReader(r))
			if err != nil || got != tc.get {
				t.Errorf("got %+v, %v; want %+v", got, err, tc.get)
			}
			if rest, _ := io.ReadAll(r); string(rest) != "rest" {
				t.Errorf("%q is left, want %q", rest, "rest")
			}
		})
	}
}

// raw is a header with a command, a family and what follows.
func raw(kind, family byte, body string) []byte {
	b := append([]byte(signature), kind, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

const four = "\xc0\x00\x02\x01\xc0\x00\x02\x02\x13\x88\x01\xbb"

func TestReadRefuses(t *testing.T) {
	summed := raw(proxied, tcp4, four+"\x03\x00\x04\x00\x00\x00\x00")
	sum := crc32.Checksum(summed, crc32.MakeTable(crc32.Castagnoli))
	binary.BigEndian.PutUint32(summed[len(summed)-4:], sum)
	if h, err := Read(bytes.NewReader(summed)); err != nil || h.Src != ap("192.0.2.1:5000") {
		t.Errorf("a good checksum: %+v, %v", h, err)
	}
	summed[headSize+3]++ // another address
	for _, tc := range []struct {
		name string
		in   []byte
		want string
	}{
		{"version 1", []byte("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"), ErrNone.Error()},
		{"TLS", append([]byte("\x16\x03\x01\x02\x00\x01\x00"), make([]byte, 100)...), ErrNone.Error()},
		{"nothing", nil, "EOF"},
		{"half a head", []byte(signature), "unexpected EOF"},
		{"half a body", raw(proxied, tcp4, four)[:headSize+4], "unexpected EOF"},
		{"other version", raw(0x31, tcp4, four), "version and command"},
		{"other command", raw(0x22, tcp4, four), "version and command"},
		{"UDP", raw(proxied, 0x12, four), "only TCP"},
		{"a socket", raw(proxied, 0x31, strings.Repeat("x", 216)), "only TCP"},
		{"short addresses", raw(proxied, tcp6, four), "12 bytes of addresses, want 36"},
		{"too long", append(append([]byte(signature), proxied, tcp4), 0xff, 0xff), "65535 bytes"},
		{"half a field", raw(proxied, tcp4, four+"\xe0\x00"), "half a field"},
		{"field too long", raw(proxied, tcp4, four+"\xe0\x00\x09x"), "9 bytes, 1 are left"},
		{"short checksum", raw(proxied, tcp4, four+"\x03\x00\x01x"), "checksum of 1 bytes"},
		{"wrong checksum", summed, "checksum is wrong"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, err := Read(bytes.NewReader(tc.in))
			if err == nil || !strings.Contains(err.Error(), tc.want) || h != (Header{}) {
				t.Errorf("got %+v, %v; want %q", h, err, tc.want)
			}
		})
	}
}

func TestLocalSaysNothing(t *testing.T) {
	for _, family := range []byte{tcp4, unspec} {
		if h, err := Read(bytes.NewReader(raw(local, family, four[:12*int(min(family, 1))]))); err != nil || h != (Header{}) {
			t.Errorf("family %#02x: got %+v, %v", family, h, err)
		}
	}
}

// FuzzRead holds that what is read survives being written again.
func FuzzRead(f *testing.F) {
	f.Add(raw(proxied, tcp4, four))
	f.Add(raw(local, unspec, ""))
	f.Add(Header{Src: ap("[2001:db8::1]:1"), Dst: ap("[2001:db8::2]:2"), SPIFFE: "spiffe://a.test/web"}.Append(nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, err := Read(bytes.NewReader(in))
		if err != nil {
			if h != (Header{}) {
				t.Fatalf("half a header beside %v", err)
			}
			return
		}
		again, err := Read(bytes.NewReader(h.Append(nil)))
		if errors.Is(err, ErrNone) || err == nil && again != h {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
	})
}
