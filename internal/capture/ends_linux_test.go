package capture

import (
	"bytes"
	"testing"
)

// opening is a packet that opens a connection, with four bytes as its stamp.
func opening(version byte, stamp [4]byte) []byte {
	ip := append([]byte{0x45, 9: 6}, make([]byte, 10)...)
	if version == 6 {
		ip = append([]byte{0x60, 6: 6}, make([]byte, 33)...)
	}
	tcp := []byte{0: 0x9c, 1: 0x40, 2: 0x3a, 3: 0x99, 12: 0x50, 13: 2, 19: 0}
	copy(tcp[8:], stamp[:])
	return append(ip, tcp...)
}

func TestSentFrom(t *testing.T) {
	for _, tt := range []struct {
		name  string
		stamp [4]byte
		port  uint16
		ok    bool
	}{
		{"no stamp", [4]byte{}, 0, true},
		{"ours", [4]byte{0xc0, 0x00, 0x3a, 0x99}, 0xc000, true},
		{"of another door", [4]byte{0xc0, 0x00, 0x3a, 0x98}, 0, false},
		{"without a port", [4]byte{0, 0, 0x3a, 0x99}, 0, false},
	} {
		for _, version := range []byte{4, 6} {
			if port, err := sentFrom(opening(version, tt.stamp)); port != tt.port || (err == nil) != tt.ok {
				t.Errorf("%s, IPv%d: %d, %v", tt.name, version, port, err)
			}
		}
	}
	for _, version := range []byte{4, 6} {
		whole := opening(version, [4]byte{0xc0, 0x00, 0x3a, 0x99})
		for n := range whole {
			if _, err := sentFrom(whole[:n]); err == nil {
				t.Errorf("IPv%d: the first %d of %d bytes are taken", version, n, len(whole))
			}
		}
	}
}

func FuzzSentFrom(f *testing.F) {
	for _, version := range []byte{4, 6} {
		f.Add(opening(version, [4]byte{}))
		f.Add(opening(version, [4]byte{0xc0, 0x00, 0x3a, 0x99}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		port, err := sentFrom(b)
		if err == nil && port != 0 && !bytes.Contains(b, []byte{byte(port >> 8), byte(port)}) {
			t.Errorf("port %d stands nowhere", port)
		}
	})
}
