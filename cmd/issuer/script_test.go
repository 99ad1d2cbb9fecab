package main

import (
	"fmt"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/meshtest"
	"sallyport/internal/scripttest"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"issuer": main}) }

func TestScript(t *testing.T) {
	scripttest.Run(t, testscript.Params{
		Condition: func(cond string) (bool, error) {
			if cond != "race" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return meshtest.Race, nil
		},
	})
}
