package egress

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
)

// A shown watches what a host says in the clear until it has shown its certificate
// in the tunnel itself, or cannot any more: in TLS 1.3 that is encrypted, and a
// session that is resumed has none. The nil *shown watches nothing.
type shown struct {
	prove func([]*x509.Certificate) error // holds the chain against what was allowed

	head []byte // of a record
	left int    // of its content
	msg  []byte // handshake messages that are not whole
	odd  int    // records of another kind, and hellos
	old  bool   // TLS 1.2, or one before, was agreed on
	over bool
}

const (
	recordChange = 20
	recordAlert  = 21

	helloTicket      = 4
	helloCertificate = 11

	extVersions = 43
)

// maxOdd bounds what bears on no certificate: records of two bytes at most, and
// hellos that ask for another.
const maxOdd = 4

// hear is told what the host sends, before the caller gets it. The error is a
// *Refusal.
func (s *shown) hear(b []byte) error {
	if s == nil {
		return nil
	}
	for len(b) > 0 && !s.over {
		if s.left == 0 {
			n := min(5-len(s.head), len(b))
			s.head, b = append(s.head, b[:n]...), b[n:]
			if len(s.head) < 5 {
				return nil
			}
			if err := s.begin(); err != nil {
				return err
			}
			continue
		}
		n := min(s.left, len(b))
		if s.head[0] == recordHandshake {
			s.msg = append(s.msg, b[:n]...)
		}
		b = b[n:]
		if s.left -= n; s.left == 0 {
			s.head = s.head[:0]
		}
		if err := s.messages(); err != nil {
			return err
		}
	}
	return nil
}

// begin looks at the head of a record.
func (s *shown) begin() error {
	s.left = int(binary.BigEndian.Uint16(s.head[3:]))
	switch kind := s.head[0]; {
	case kind == recordHandshake && s.left > 0:
		return nil
	case kind == recordChange && s.left == 1 && s.old && len(s.msg) == 0:
		s.end() // a session goes on whose keys are from a handshake before
		return nil
	case kind == recordChange && s.left == 1, kind == recordAlert && s.left == 2:
		if s.odd++; s.odd <= maxOdd {
			return nil
		}
	}
	return refuse(ReasonCertificate, "the host sent a record of type %d and %d bytes before its certificate", s.head[0], s.left)
}

// messages takes in the messages that are whole.
func (s *shown) messages() error {
	for len(s.msg) >= 4 && !s.over {
		size := 4 + (int(s.msg[1])<<16 | int(s.msg[2])<<8 | int(s.msg[3]))
		if size > MaxHello {
			return refuse(ReasonCertificate, "the host sent a handshake message of %d bytes; %d is the limit", size, MaxHello)
		}
		if len(s.msg) < size {
			return nil
		}
		kind, body := s.msg[0], s.msg[4:size]
		s.msg = s.msg[size:]
		switch {
		case kind == helloServer && !s.old:
			if err := s.agreed(body); err != nil {
				return err
			}
		case kind == helloTicket && s.old:
			s.end() // as a change of ciphers does
		case kind == helloCertificate && s.old:
			chain, err := certificates(body)
			if err == nil {
				err = s.prove(chain)
			}
			s.end()
			return err
		default:
			return refuse(ReasonCertificate, "the host sent a handshake message of type %d instead of its certificate", kind)
		}
	}
	return nil
}

func (s *shown) end() { s.over, s.head, s.msg = true, nil, nil }

// agreed looks at a ServerHello for the version.
func (s *shown) agreed(body []byte) error {
	f := &fields{b: body}
	f.take(2)
	random := f.take(32)
	f.take(f.u8())
	f.take(2 + 1) // suite, compression
	if f.bad {
		return refuse(ReasonCertificate, "the ServerHello is malformed")
	}
	if bytes.Equal(random, retryRandom) {
		if s.odd++; s.odd > maxOdd {
			return refuse(ReasonCertificate, "the host asks for one ClientHello after the other")
		}
		return nil
	}
	s.old = true
	ext := &fields{b: f.take(f.u16())} // there may be none
	for len(ext.b) > 0 && !ext.bad {
		kind := ext.u16()
		if data := ext.take(ext.u16()); kind == extVersions && len(data) == 2 && binary.BigEndian.Uint16(data) == 0x0304 {
			s.end()
		}
	}
	return nil
}

// certificates reads the chain of a Certificate message (RFC 5246, 7.4.2).
func certificates(body []byte) (chain []*x509.Certificate, err error) {
	f := &fields{b: body}
	list := &fields{b: f.take(f.u8()<<16 | f.u16())}
	for !list.bad && len(list.b) > 0 {
		der := list.take(list.u8()<<16 | list.u16())
		if list.bad {
			break
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, refuse(ReasonCertificate, "a certificate in the tunnel cannot be read: %s", clip(err.Error()))
		}
		chain = append(chain, c)
	}
	if f.bad || list.bad || len(f.b) > 0 || len(chain) == 0 {
		return nil, refuse(ReasonCertificate, "the Certificate message is malformed, or empty")
	}
	return chain, nil
}

// proven says whether a chain that was shown in a tunnel is for its host, as that
// of a probe must be.
func (g *Gateway) proven(t *tunnel, chain []*x509.Certificate) error {
	cfg, err := g.originTLS(&Target{Host: t.host, How: t.how})
	if err != nil {
		return err
	}
	opts := x509.VerifyOptions{DNSName: cfg.ServerName, Roots: cfg.RootCAs, Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(opts); err != nil {
		return refuse(ReasonCertificate, "%s did not prove its name in the tunnel: %s", t.host, clip(err.Error()))
	}
	return nil
}
