package socks

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
)

// said is a client that has said all at once.
type said struct {
	io.Reader
	heard bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) { return s.heard.Write(p) }

const hello = "\x05\x01\x00"

func TestAccept(t *testing.T) {
	for _, c := range []struct {
		name, says string
		want       Request
		heard      string
		reply      Reply // of an *Error
		err        string
	}{
		{"a name", hello + "\x05\x01\x00\x03\x0fAPI.stripe.test\x01\xbb", Request{Connect, "API.stripe.test:443"}, "\x05\x00", 0, ""},
		{"an IPv4 address", hello + "\x05\x01\x00\x01\x09\x09\x09\x09\x00\x50", Request{Connect, "9.9.9.9:80"}, "\x05\x00", 0, ""},
		{"an IPv6 address", hello + "\x05\x01\x00\x04\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01\x01\xbb", Request{Connect, "[2001:db8::1]:443"}, "\x05\x00", 0, ""},
		{"a mapped address", hello + "\x05\x01\x00\x04" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x01\xbb", Request{Connect, "[::ffff:127.0.0.1]:443"}, "\x05\x00", 0, ""},
		{"an address written as a name", hello + "\x05\x01\x00\x03\x077.0.0.1\x00\x16", Request{Connect, "7.0.0.1:22"}, "\x05\x00", 0, ""},
		{"several methods", "\x05\x03\x02\x01\x00\x05\x01\x00\x03\x01a\x00\x01", Request{Connect, "a:1"}, "\x05\x00", 0, ""},
		{"BIND", hello + "\x05\x02\x00\x01\x09\x09\x09\x09\x00\x50", Request{Bind, "9.9.9.9:80"}, "\x05\x00", 0, ""},
		{"UDP ASSOCIATE", hello + "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", Request{Associate, "0.0.0.0:0"}, "\x05\x00", 0, ""},

		{"version 4", "\x04\x01\x00\x50\x09\x09\x09\x09\x00", Request{}, "", Granted, "version 4"},
		{"a password is offered only", "\x05\x01\x02\x05\x01\x00\x03\x01a\x00\x01", Request{}, "\x05\xff", Granted, "without authentication"},
		{"no method at all", "\x05\x00", Request{}, "\x05\xff", Granted, "without authentication"},
		{"another version in the request", hello + "\x04\x01\x00\x03\x01a\x00\x01", Request{}, "\x05\x00", Failed, "begins with"},
		{"the reserved byte is set", hello + "\x05\x01\x01\x03\x01a\x00\x01", Request{}, "\x05\x00", Failed, "begins with"},
		{"an unknown kind of address", hello + "\x05\x01\x00\x02\x01a\x00\x01", Request{}, "\x05\x00", NoAddress, "address type 2"},
		{"an empty name", hello + "\x05\x01\x00\x03\x00\x00\x01", Request{}, "\x05\x00", Failed, "none of a host"},
		{"a name with a colon", hello + "\x05\x01\x00\x03\x07ok:443#\x00\x01", Request{}, "\x05\x00", Failed, "none of a host"},
		{"a name with a line end", hello + "\x05\x01\x00\x03\x05ok\r\nx\x00\x01", Request{}, "\x05\x00", Failed, "none of a host"},
		{"a name with NUL", hello + "\x05\x01\x00\x03\x05ok.\x00x\x00\x01", Request{}, "\x05\x00", Failed, "none of a host"},
		{"userinfo", hello + "\x05\x01\x00\x03\x07ok@evil\x00\x01", Request{}, "\x05\x00", Failed, "none of a host"},

		{"it ends in the methods", "\x05\x02\x00", Request{}, "", 0, "unexpected EOF"},
		{"it ends before the request", hello, Request{}, "\x05\x00", 0, "unexpected EOF"},
		{"it ends in the name", hello + "\x05\x01\x00\x03\x05ok", Request{}, "\x05\x00", 0, "unexpected EOF"},
		{"it ends before the port", hello + "\x05\x01\x00\x03\x02ok", Request{}, "\x05\x00", 0, "unexpected EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := &said{Reader: strings.NewReader(c.says + "tail")}
			if strings.HasPrefix(c.name, "it ends") {
				cl.Reader = strings.NewReader(c.says)
			}
			req, err := Accept(cl)
			if heard := cl.heard.String(); heard != c.heard {
				t.Errorf("the client heard %q, want %q", heard, c.heard)
			}
			if c.err != "" {
				var bad *Error
				if err == nil || !strings.Contains(err.Error(), c.err) || errors.As(err, &bad) && bad.Reply != c.reply {
					t.Fatalf("got %+v, %v (%+v)", req, err, bad)
				}
				return
			}
			if err != nil || req != c.want {
				t.Fatalf("got %+v, %v", req, err)
			}
			if rest, _ := io.ReadAll(cl); string(rest) != "tail" {
				t.Errorf("left %q", rest)
			}
		})
	}
}

func TestReply(t *testing.T) {
	if got := Forbidden.Append(nil); !bytes.Equal(got, []byte{5, 2, 0, 1, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("got %x", got)
	}
}

// FuzzAccept holds what is understood to be writable as a target of CONNECT, and
// nothing to be read beyond it.
func FuzzAccept(f *testing.F) {
	f.Add([]byte(hello + "\x05\x01\x00\x03\x0fAPI.stripe.test\x01\xbb"))
	f.Add([]byte(hello + "\x05\x02\x00\x01\x09\x09\x09\x09\x00\x50"))
	f.Add([]byte(hello + "\x05\x01\x00\x04" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x01\xbb"))
	f.Add([]byte("\x05\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		cl := &said{Reader: bytes.NewReader(b)}
		req, err := Accept(cl)
		if err != nil {
			return
		}
		if strings.ContainsAny(req.Authority, " \r\n\t\x00/@?#%") || strings.Count(req.Authority, ":") > 1 && req.Authority[0] != '[' {
			t.Fatalf("authority %q", req.Authority)
		}
		if req.Authority[0] == '[' {
			if _, err := netip.ParseAddrPort(req.Authority); err != nil {
				t.Fatal(err)
			}
		}
		rest, _ := io.ReadAll(cl)
		if !bytes.HasSuffix(b, rest) || len(b)-len(rest) < 3+4+1+2 || len(b)-len(rest) > 2+255+4+1+255+2 {
			t.Fatalf("%d of %d bytes left", len(rest), len(b))
		}
	})
}
