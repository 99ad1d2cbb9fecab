package keyset

import (
	"crypto/rsa"
	"errors"
	"math/big"

	"sallyport/internal/jose"
)

// parseKeys reads a key set and refuses one with an RSA key from chips that
// made keys which can be factored (CVE-2017-15361): the others may be as good,
// but whoever published them does not look.
func parseKeys(doc []byte) (jose.Keys, error) {
	keys, err := jose.ParseKeys(doc)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if r, ok := k.Public.(*rsa.PublicKey); ok && factorable(r.N) {
			return nil, errors.New("key set holds an RSA key that can be factored (CVE-2017-15361): its owner must make another one elsewhere")
		}
	}
	return keys, nil
}

// rocaPrimes are those modulo which a factorable key is a power of 65537. No
// other key is that for all of them by chance.
var rocaPrimes = []int64{
	3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
}

func factorable(n *big.Int) bool {
	var m big.Int
	for _, p := range rocaPrimes {
		want := m.Mod(n, big.NewInt(p)).Int64()
		power, found := int64(1), false
		for range p {
			if found = found || power == want; found {
				break
			}
			power = power * 65537 % p
		}
		if !found {
			return false
		}
	}
	return true
}
