package record

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"math"

	"golang.org/x/crypto/chacha20poly1305"
)

const (
	nonceSize = 12
	tagSize   = 16
	// maxSecret is the size of a secret of SHA-384.
	maxSecret = 48
)

// A suite is what a cipher suite of TLS 1.3 means for records.
type suite struct {
	hash      func() hash.Hash
	size      int // of a secret
	key       int // size
	newCipher func(key []byte) (cipher.AEAD, error)
}

func suiteOf(id uint16) (*suite, error) {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &aes128, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return &aes256, nil
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return &chacha20, nil
	}
	return nil, fmt.Errorf("cipher suite %#04x is none of TLS 1.3", id)
}

var (
	aes128   = suite{sha256.New, sha256.Size, 16, newGCM}
	aes256   = suite{sha512.New384, sha512.Size384, 32, newGCM}
	chacha20 = suite{sha256.New, sha256.Size, chacha20poly1305.KeySize, chacha20poly1305.New}
)

func newGCM(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// expand is HKDF-Expand-Label (RFC 8446 section 7.1) without context.
func (s *suite) expand(secret []byte, label string, size int) ([]byte, error) {
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(size))
	info = append(append(append(info, byte(len(label))), label...), 0)
	return hkdf.Expand(s.hash, secret, string(info), size)
}

// keys are those of one direction, and count its records.
type keys struct {
	aead cipher.AEAD // nil at rest: the secret has all that is needed
	seq  uint64
	iv   [nonceSize]byte
	// nonce is where the one of a record is put together: on the stack it would
	// not stay there.
	nonce  [nonceSize]byte
	secret [maxSecret]byte
}

// set begins with a secret, of which it takes a copy.
func (k *keys) set(s *suite, secret []byte) error {
	aead, err := s.aeadOf(secret)
	if err != nil {
		return err
	}
	iv, err := s.expand(secret, "iv", nonceSize)
	if err != nil {
		return err
	}
	defer clear(iv)
	copy(k.secret[:], secret)
	copy(k.iv[:], iv)
	k.aead, k.seq = aead, 0
	return nil
}

// wake makes the cipher again that rest has given up.
func (k *keys) wake(s *suite) (err error) {
	if k.aead == nil {
		k.aead, err = s.aeadOf(k.secret[:s.size])
	}
	return err
}

// rest gives up what takes most room and can be made again. The count of records
// stays: no nonce comes twice.
func (k *keys) rest() { k.aead = nil }

func (s *suite) aeadOf(secret []byte) (cipher.AEAD, error) {
	key, err := s.expand(secret, "key", s.key)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return s.newCipher(key)
}

// next is what a KeyUpdate does (RFC 8446 section 7.2).
func (k *keys) next(s *suite) error {
	secret, err := s.expand(k.secret[:s.size], "traffic upd", s.size)
	if err != nil {
		return err
	}
	defer clear(secret)
	return k.set(s, secret)
}

// number gives the nonce of the next record. No two records of the same keys
// have the same.
func (k *keys) number() ([]byte, error) {
	if k.seq == math.MaxUint64 {
		return nil, errSpent
	}
	copy(k.nonce[:], k.iv[:])
	var seq [8]byte
	binary.BigEndian.PutUint64(seq[:], k.seq)
	for i, b := range seq {
		k.nonce[nonceSize-8+i] ^= b
	}
	k.seq++
	return k.nonce[:], nil
}

var errSpent = errors.New("as many records as keys are good for")

// wipe forgets what is secret.
func (k *keys) wipe() { *k = keys{} }

// secrets takes the secrets of both directions from crypto/tls, which gives them
// to nobody but the writer of a key log.
type secrets struct {
	client, server [maxSecret]byte
	// sizes; 0 until it was there.
	ofClient, ofServer int
}

// Write takes one line of a key log, and wipes it: its memory is nobody else's.
func (s *secrets) Write(line []byte) (int, error) {
	defer clear(line)
	f := bytes.Fields(line)
	if len(f) != 3 {
		return 0, errors.New("key log: a line of other than three words")
	}
	dst, n := &s.client, &s.ofClient
	switch string(f[0]) {
	case "CLIENT_TRAFFIC_SECRET_0":
	case "SERVER_TRAFFIC_SECRET_0":
		dst, n = &s.server, &s.ofServer
	default:
		return len(line), nil // of the handshake, or for exporters
	}
	if *n != 0 || hex.DecodedLen(len(f[2])) > maxSecret {
		return 0, errors.New("key log: a secret that was not expected")
	}
	var err error
	*n, err = hex.Decode(dst[:], f[2])
	return len(line), err
}

// wipe forgets them.
func (s *secrets) wipe() { *s = secrets{} }
