package mesh

import (
	"math/big"
	"strings"
	"testing"
	"time"
)

func TestParseSerial(t *testing.T) {
	for in, want := range map[string]string{
		"1": "1", "0A:ff": "aff", "0xDEADBEEF": "deadbeef", "00ff": "ff",
		strings.Repeat("f", 40): strings.Repeat("f", 40),
		"":                      "", "0": "", "-1": "", "+1": "", "1_0": "", "xyz": "", ":": "", strings.Repeat("f", 41): "",
	} {
		got, err := ParseSerial(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseSerial(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	if got := SerialText(big.NewInt(255)); got != "ff" {
		t.Errorf("SerialText(255) = %q", got)
	}
}

func TestRevokedSVIDValidate(t *testing.T) {
	good := RevokedSVID{Serial: "ff", Until: time.Unix(1, 0), Why: WhyBanned}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*RevokedSVID){
		"no serial":       func(r *RevokedSVID) { r.Serial = "" },
		"leading zeros":   func(r *RevokedSVID) { r.Serial = "0ff" },
		"upper case":      func(r *RevokedSVID) { r.Serial = "FF" },
		"no end":          func(r *RevokedSVID) { r.Until = time.Time{} },
		"a strange cause": func(r *RevokedSVID) { r.Why = "\x1b[31m" },
	} {
		bad := good
		spoil(&bad)
		if bad.Validate() == nil {
			t.Errorf("%s: %+v is valid", name, bad)
		}
	}
}
