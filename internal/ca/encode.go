package ca

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// The parts that are the same in every leaf, in the order of crypto/x509.
var (
	// usages are the extensions of what the key may do. Key usage is
	// digitalSignature alone: seven unused bits, then bit 0. Basic constraints
	// say neither cA nor a length.
	usages = written(func(b *cryptobyte.Builder) {
		addExtension(b, oidKeyUsage, true, func(b *cryptobyte.Builder) { b.AddBytes([]byte{byte(der.BIT_STRING), 2, 7, 0x80}) })
		addExtension(b, oidEKU, false, func(b *cryptobyte.Builder) {
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}) // serverAuth
				b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}) // clientAuth
			})
		})
		addExtension(b, oidBasicConstraints, true, func(b *cryptobyte.Builder) { b.AddBytes([]byte{byte(der.SEQUENCE), 0}) })
	})
	// algorithm is ECDSA with SHA-256.
	algorithm = written(func(b *cryptobyte.Builder) {
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2})
		})
	})
)

func written(f cryptobyte.BuilderContinuation) []byte {
	var b cryptobyte.Builder
	f(&b)
	return b.BytesOrPanic()
}

const (
	tagDNS = der.Tag(2 | 0x80) // GeneralName dNSName
	tagURI = der.Tag(6 | 0x80) // GeneralName uniformResourceIdentifier
)

// encode writes what of the draft is signed, byte for byte as crypto/x509 does
// from the template; a test compares the two. crypto/x509 gives the bytes only
// with a signature that it has made and verified: three quarters of the cost
// of a certificate, for a signature that nobody is to see.
func (d *draft) encode() ([]byte, error) {
	t := d.template
	if t.SerialNumber.Sign() <= 0 {
		return nil, fmt.Errorf("serial number %v is not positive", t.SerialNumber)
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, 1024))
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(der.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // v3
		b.AddASN1BigInt(t.SerialNumber)
		b.AddBytes(algorithm)
		b.AddBytes(d.want.issuer.RawSubject)
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, t.NotBefore)
			addTime(b, t.NotAfter)
		})
		b.AddASN1(der.SEQUENCE, func(*cryptobyte.Builder) {}) // no subject
		b.AddBytes(d.want.key)
		b.AddASN1(der.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(der.SEQUENCE, d.extensions)
		})
	})
	return b.Bytes()
}

func (d *draft) extensions(b *cryptobyte.Builder) {
	b.AddBytes(usages)
	addExtension(b, oidSKI, false, func(b *cryptobyte.Builder) { b.AddASN1OctetString(d.template.SubjectKeyId) })
	addExtension(b, oidAKI, false, func(b *cryptobyte.Builder) {
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(der.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(d.want.issuer.SubjectKeyId) })
		})
	})
	addExtension(b, oidSAN, true, func(b *cryptobyte.Builder) { // critical, since there is no subject
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, name := range d.template.DNSNames {
				b.AddASN1(tagDNS, func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
			}
			for _, uri := range d.template.URIs {
				b.AddASN1(tagURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(uri.String())) })
			}
		})
	})
}

func addExtension(b *cryptobyte.Builder, id asn1.ObjectIdentifier, critical bool, value cryptobyte.BuilderContinuation) {
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(id)
		if critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1(der.OCTET_STRING, value)
	})
}

// addTime follows RFC 5280 section 4.1.2.5: UTCTime until the end of 2049.
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

// assemble writes a certificate of what is signed and a signature.
func assemble(tbs, signature []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+32))
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(algorithm)
		b.AddASN1BitString(signature)
	})
	raw, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode certificate: %w", err)
	}
	return raw, nil
}

// parts reads what is signed and the signature of a certificate that assemble
// wrote.
func parts(raw []byte) (tbs, signature []byte, err error) {
	var inner, first, alg cryptobyte.String
	in := cryptobyte.String(raw)
	if !in.ReadASN1(&inner, der.SEQUENCE) || !in.Empty() ||
		!inner.ReadASN1Element(&first, der.SEQUENCE) ||
		!inner.ReadASN1Element(&alg, der.SEQUENCE) || !bytes.Equal(alg, algorithm) ||
		!inner.ReadASN1BitStringAsBytes(&signature) || !inner.Empty() {
		return nil, nil, errors.New("the signed certificate is not well formed")
	}
	return first, signature, nil
}

// noSignature stands where the linter's copy has no signature: the ECDSA pair
// (1, 1), which no key of ours has made.
var noSignature = []byte{byte(der.SEQUENCE), 6, byte(der.INTEGER), 1, 1, byte(der.INTEGER), 1, 1}
