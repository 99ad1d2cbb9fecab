package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// An internet is the world outside, on loopback: a name server, and one TLS
// server for each name, which counts who comes.
type internet struct {
	// CA is the certificate that ordinary programs trust, in PEM.
	CA []byte
	// DNS answers every name of the internet with 127.0.0.1.
	DNS netip.AddrPort
	// Sites are the servers, by name.
	Sites map[string]*site

	udp, tcp *dns.Server
}

// A site is one external host.
type site struct {
	Addr netip.AddrPort
	// Connections counts accepted connections, also those that fail.
	Connections atomic.Int64

	srv *http.Server
}

// openInternet starts the servers; Close ends them.
func openInternet(names ...string) (*internet, error) {
	in := &internet{Sites: map[string]*site{}}
	caKey, ca, err := in.makeCA()
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		s, err := openSite(name, ca, caKey, int64(i)+2)
		if err != nil {
			in.Close()
			return nil, err
		}
		in.Sites[name] = s
	}
	if err := in.serveDNS(); err != nil {
		in.Close()
		return nil, err
	}
	return in, nil
}

func (in *internet) makeCA() (*ecdsa.PrivateKey, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Demo Internet CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	in.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	ca, err := x509.ParseCertificate(der)
	return key, ca, err
}

func openSite(name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey, serial int64) (*site, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(serial), DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca, key.Public(), caKey)
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &site{Addr: ln.Addr().(*net.TCPAddr).AddrPort()}
	s.srv = &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "{\"from\": %q}\n", name)
		}),
		ConnState: func(_ net.Conn, st http.ConnState) {
			if st == http.StateNew {
				s.Connections.Add(1)
			}
		},
	}
	go s.srv.ServeTLS(ln, "", "") //nolint:errcheck // ends with Close
	return s, nil
}

// serveDNS answers over UDP and TCP on one port.
func (in *internet) serveDNS() error {
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if len(q.Question) == 1 {
			name, kind := q.Question[0].Name, q.Question[0].Qtype
			if in.Sites[name[:max(len(name)-1, 0)]] == nil {
				m.Rcode = dns.RcodeNameError
			} else if kind == dns.TypeA {
				m.Answer = []dns.RR{&dns.A{
					Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
					A:   net.IPv4(127, 0, 0, 1),
				}}
			}
		}
		_ = w.WriteMsg(m)
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	pc, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		ln.Close()
		return err
	}
	in.DNS = ln.Addr().(*net.TCPAddr).AddrPort()
	in.tcp = &dns.Server{Listener: ln, Handler: h}
	in.udp = &dns.Server{PacketConn: pc, Handler: h}
	go in.tcp.ActivateAndServe() //nolint:errcheck // ends with Close
	go in.udp.ActivateAndServe() //nolint:errcheck // ends with Close
	return nil
}

// Close ends every server.
func (in *internet) Close() error {
	var errs []error
	for _, s := range in.Sites {
		errs = append(errs, s.srv.Close())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, s := range []*dns.Server{in.tcp, in.udp} {
		if s != nil {
			errs = append(errs, s.ShutdownContext(ctx))
		}
	}
	return errors.Join(errs...)
}
