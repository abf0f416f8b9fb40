"""CLINC150: 22,500 requests to an assistant, each with one of 150 intents.

Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope
Prediction". CC BY 3.0. The requests out of scope are left out.
"""

import json
from collections.abc import Mapping

import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths

COMMIT = "828f8093932c8fe6ca7936c3d2e52903b1c523de"
NAME = "data_full.json"
URL = f"https://raw.githubusercontent.com/clinc/oos-eval/{COMMIT}/data/{NAME}"
PARTS = {"train": "train", "validation": "val", "test": "test"}
INTENTS = """
accept_reservations account_blocked alarm application_status apr are_you_a_bot balance
bill_balance bill_due book_flight book_hotel calculator calendar calendar_update
calories cancel cancel_reservation car_rental card_declined carry_on change_accent
change_ai_name change_language change_speed change_user_name change_volume
confirm_reservation cook_time credit_limit credit_limit_change credit_score
current_location damaged_card date definition direct_deposit directions distance
do_you_have_pets exchange_rate expiration_date find_phone flight_status flip_coin
food_last freeze_account fun_fact gas gas_type goodbye greeting how_busy
how_old_are_you improve_credit_score income ingredient_substitution ingredients_list
insurance insurance_change interest_rate international_fees international_visa
jump_start last_maintenance lost_luggage make_call maybe meal_suggestion
meaning_of_life measurement_conversion meeting_schedule min_payment mpg new_card
next_holiday next_song no nutrition_info oil_change_how oil_change_when order
order_checks order_status pay_bill payday pin_change play_music plug_type pto_balance
pto_request pto_request_status pto_used recipe redeem_rewards reminder reminder_update
repeat replacement_card_duration report_fraud report_lost_card reset_settings
restaurant_reservation restaurant_reviews restaurant_suggestion rewards_balance
roll_dice rollover_401k routing schedule_maintenance schedule_meeting share_location
shopping_list shopping_list_update smart_home spelling spending_history sync_device
taxes tell_joke text thank_you time timer timezone tire_change tire_pressure todo_list
todo_list_update traffic transactions transfer translate travel_alert
travel_notification travel_suggestion uber update_playlist user_name vaccines w2
weather what_are_your_hobbies what_can_i_ask_you what_is_your_name what_song
where_are_you_from whisper_mode who_do_you_work_for who_made_you yes
"""


class Clinc150(LocalBuilder, skip_registration=True):
    """Requests in file order: 15,000, 3,000 and 4,500."""

    name = "clinc150"
    VERSION = tfds.core.Version("2.0.0")  # 1.0.0 did not number the intents
    folder = "clinc150"
    origin = URL
    features: Mapping = {
        "text": TEXT,
        "intent": tfds.features.ClassLabel(names=INTENTS.split()),
    }
    files: Mapping[str, str] = {
        f"{NAME}.gz": "59969ccdb9192885f0ca3d475172ca845aa4a41ca0e2881782ba4c3bd37e7dbf"
    }
    downloads: Mapping[str, Download] = {
        NAME: (
            URL,
            2_495_390,
            "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
        )
    }

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """Of the file, compressed or not."""
        ((name, path),) = paths.items()
        content = self.read_text(name, path)
        with self.reading(name, "lists of [text, intent] by split"):
            found = json.loads(content)
            splits = {
                split: [{"text": text, "intent": kind} for text, kind in found[part]]
                for split, part in PARTS.items()
            }
        intents = {example["intent"] for part in splits.values() for example in part}
        if unknown := intents.difference(INTENTS.split()):
            raise self.wrong(name, f"has {min(unknown)!r}, none of the 150 intents")
        return splits
