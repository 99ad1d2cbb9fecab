package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/bench/rig"
)

// A limit is what crypto/x509 needs to make a certificate from a request.
type limit struct {
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
	csr []byte
	id  *url.URL
}

func newLimit() (*limit, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "raw"}, NotBefore: now, NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return nil, err
	}
	l := &limit{key: key, id: &url.URL{Scheme: "spiffe", Host: "bench.test", Path: "/ns/n1/sa/w1"}}
	if l.ca, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	l.csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, leaf)
	return l, err
}

// one makes one certificate.
func (l *limit) one() error {
	req, err := x509.ParseCertificateRequest(l.csr)
	if err != nil {
		return err
	}
	if err := req.CheckSignature(); err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{l.id}, NotBefore: now, NotAfter: now.Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, l.ca, req.PublicKey, l.key)
	if err != nil {
		return err
	}
	_, err = x509.ParseCertificate(der)
	return err
}

// run makes certificates on every core for a round.
func (l *limit) run(round time.Duration) (sample, error) {
	before, err := rig.OwnCPU()
	if err != nil {
		return sample{}, err
	}
	var n atomic.Int64
	var failed atomic.Bool
	start := time.Now()
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for time.Since(start) < round {
				if l.one() != nil {
					failed.Store(true)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	wall := time.Since(start)
	after, err := rig.OwnCPU()
	if failed.Load() {
		err = errors.New("raw: crypto/x509 refused its own request")
	}
	return sample{count: n.Load(), wall: wall, cpu: after - before}, err
}
